"""Files that lie beside a model's weights, as patterns: a tokenizer or processor, how to generate."""

TOKENIZER_FILES = (
    "added_tokens.json", "additional_chat_templates/*.jinja", "chat_template.jinja", "chat_template.json",
    "merges.txt", "preprocessor_config.json", "processor_config.json", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt", "*.tiktoken",
)  # fmt: skip
BESIDE_MODELS = (*TOKENIZER_FILES, "generation_config.json")
