"""The style sheet of a report."""

STYLE = """
:root{--page:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d9dee4;--panel:#f5f7f9;--dot:#fff;--dot-edge:#1b1f24;
--bits2:#d3e4f6;--bits3:#9fc5ec;--bits4:#609dd9;--bits8:#2b6cb0;--bits16:#143f70;
--baseline:#6b7280;--uniform:#9333a8;--allocation:#2563eb;--evolution:#c2570c;--trust:#0f8a63;
--weights:#2b6cb0;--metadata:#8db8e6;--untouched:#a3adb8;--adapters:#c2570c;--gradients:#e8955a;--optimizer:#f3c9a5}
@media (prefers-color-scheme:dark){:root{--page:#14171b;--ink:#e6e9ed;--soft:#a2abb5;--line:#333a42;--panel:#1d2228;
--dot:#fff;--dot-edge:#0b0d10;--bits2:#1c3450;--bits3:#27507f;--bits4:#3474b6;--bits8:#6aa6e0;--bits16:#c1dcf6;
--baseline:#9aa4af;--uniform:#d58be6;--allocation:#6ea1ff;--evolution:#f08a4b;--trust:#3cc79a;
--weights:#3f86d0;--metadata:#27507f;--untouched:#5d6772;--adapters:#f08a4b;--gradients:#b4622f;--optimizer:#7c4524}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:920px;margin:0 auto;padding:24px 16px 64px}
h1{font-size:1.6rem;margin:0 0 12px;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:40px 0 8px}h3{font-size:1rem}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:0}
.facts div{background:var(--panel);border-radius:6px;padding:8px 14px}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-size:1.1rem}
.note{color:var(--soft);font-size:.9rem;max-width:70ch}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem;margin:8px 0}
th,td{text-align:left;padding:4px 12px 4px 0;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500}.number{text-align:right;padding-left:8px;font-variant-numeric:tabular-nums}
pre{background:var(--panel);border-radius:6px;padding:12px;overflow-x:auto;font-size:.85rem}
summary{cursor:pointer;color:var(--soft)}
.figure{max-width:100%;height:auto;display:block}.figure[width="680"]{min-width:560px}
.figure text{fill:var(--soft);font-size:11px}
.figure .panel-title{fill:var(--ink);font-size:12px}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:6px 0;font-size:.85rem}
.key{display:inline-flex;align-items:center;gap:6px}.swatch{width:14px;height:14px;border-radius:2px}
.bits2{fill:var(--bits2);background:var(--bits2)}.bits3{fill:var(--bits3);background:var(--bits3)}
.bits4{fill:var(--bits4);background:var(--bits4)}.bits8{fill:var(--bits8);background:var(--bits8)}
.bits16{fill:var(--bits16);background:var(--bits16)}
.dot{fill:var(--dot);stroke:var(--dot-edge)}.grid{stroke:var(--line)}
.budget{stroke:var(--ink);stroke-width:1.5;stroke-dasharray:4 3}
.mark{stroke:var(--page);stroke-width:1}.mark.baseline{fill:var(--baseline)}.mark.uniform{fill:var(--uniform)}.mark.allocation{fill:var(--allocation)}
.mark.evolution{fill:var(--evolution)}.mark.trust_region{fill:var(--trust)}
.weight_bytes{fill:var(--weights);background:var(--weights)}
.metadata_bytes{fill:var(--metadata);background:var(--metadata)}
.untouched_bytes{fill:var(--untouched);background:var(--untouched)}
.adapter_bytes{fill:var(--adapters);background:var(--adapters)}
.gradient_bytes{fill:var(--gradients);background:var(--gradients)}
.optimizer_bytes{fill:var(--optimizer);background:var(--optimizer)}
"""
