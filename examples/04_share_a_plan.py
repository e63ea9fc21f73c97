"""Share a plan: save it to a folder, push it to the hub, load it from either, and apply it.

    python examples/04_share_a_plan.py --plan search-out/plan
    python examples/04_share_a_plan.py --plan search-out/plan --repo_id me/smollm2-autoqra-4bit

The second needs a token (`hf auth login`). Without --repo_id nothing leaves this machine.
"""

import argparse

from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_autoqra import AutoQRAConfig, BitRankPlan


def main() -> None:
    """Save, push where asked, load, apply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", default="search-out/plan", help="folder or hub id")
    parser.add_argument("--copy_to", default="shared-plan", help="folder to save to, with a model card")
    parser.add_argument("--repo_id", help="hub repository to push to")
    parser.add_argument("--model", help="base model; the plan's by default")
    args = parser.parse_args()

    plan = BitRankPlan.from_pretrained(args.plan)
    plan.save_pretrained(args.copy_to)
    if args.repo_id:
        print("pushed:", plan.push_to_hub(args.repo_id))

    loaded = BitRankPlan.from_pretrained(args.copy_to)
    print(loaded, "equal:", loaded == plan)

    base = AutoModelForCausalLM.from_pretrained(args.model or loaded.base_model.name_or_path)
    model = get_peft_model(base, AutoQRAConfig(plan=loaded, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()


if __name__ == "__main__":
    main()
