"""The style sheet of a report."""

from __future__ import annotations

from peft_autoqra.colours import INK, LINE, PAGE, SOFT, reference, stylesheet

_PANEL_LIGHT, _PANEL_DARK = "#f5f7f9", "#1d2228"
_LINK_LIGHT, _LINK_DARK = "#0b5cad", "#7cb8f7"

STYLE = (
    f"""
{stylesheet()}:root{{--panel:{_PANEL_LIGHT};--link:{_LINK_LIGHT};--page:{reference(PAGE)};--ink:{reference(INK)};
--soft:{reference(SOFT)};--line:{reference(LINE)}}}
@media screen and (prefers-color-scheme:dark){{:root{{--panel:{_PANEL_DARK};--link:{_LINK_DARK}}}}}"""
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,sans-serif}
header,main{max-width:860px;margin:0 auto;padding:0 16px}
header{padding-top:28px}main{padding-bottom:64px}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:44px 0 8px}h3{font-size:1rem;margin:20px 0 4px}
a{color:var(--link)}
nav ul{display:flex;flex-wrap:wrap;gap:4px 18px;list-style:none;margin:16px 0 0;padding:0;font-size:.9rem}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:0}
.facts div{background:var(--panel);border-radius:6px;padding:8px 11px}
.facts dt{color:var(--soft);font-size:.8rem}.facts dd{margin:0;font-size:1.1rem;font-variant-numeric:tabular-nums}
.verdict{border-left:3px solid var(--link);padding:2px 0 2px 12px;max-width:72ch}
.note,figcaption{color:var(--soft);font-size:.9rem;max-width:76ch}
figure{margin:0 0 12px}figcaption{margin-bottom:10px}
.scroll{overflow-x:auto;
background:linear-gradient(to left,var(--page) 40%,transparent) 100% 0/48px 100% no-repeat local,
linear-gradient(to left,var(--line),transparent) 100% 0/14px 100% no-repeat scroll}
:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.87rem;margin:12px 0}
caption{text-align:left;font-weight:600;padding-bottom:4px}
th,td{text-align:left;padding:4px 14px 4px 0;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
thead th{color:var(--soft);font-weight:500}tbody th{font-weight:500}
.number{text-align:right;font-variant-numeric:tabular-nums}
pre{background:var(--panel);border-radius:6px;padding:12px;overflow-x:auto;font-size:.85rem;margin:8px 0}
details{margin:10px 0}summary{cursor:pointer;color:var(--link)}
svg{display:block;max-width:100%;height:auto}
svg *{stroke-linejoin:round}
svg text{font-family:system-ui,sans-serif!important}
@media print{body{font-size:11px}.scroll{overflow:visible}figure,tr{break-inside:avoid}nav{display:none}
svg{min-width:0!important}th,td{white-space:normal}}
"""
)
