"""The style sheet of the pages: one hand for screen, phone, dark mode and print."""

from __future__ import annotations

# Okabe and Ito's colours, which colour-blind readers can tell apart; lighter ones on dark ground.
STYLE = (
    """
:root{color-scheme:light dark;--ground:#fff;--card:#f5f7f9;--ink:#1d2733;--soft:#5b6875;
--edge:#d5dbe1;--good:#00805d;--bad:#b3261e;--watch:#9a5b00;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b0508a;--c4:#a37a00;--c5:#3b9bd0;--c6:#7a7a7a}
@media (prefers-color-scheme:dark){:root{--ground:#14181d;--card:#1d232a;--ink:#e6eaee;
--soft:#a3aeb9;--edge:#3a444e;--good:#4cc39a;--bad:#ff8a80;--watch:#f0b45a;
--c0:#5fb0e5;--c1:#f28a44;--c2:#3ccf9f;--c3:#e08cc0;--c4:#e3c04d;--c5:#9bd5f5;--c6:#b5b5b5}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:0 auto;padding:1.5rem 1rem 4rem;
background:var(--ground);color:var(--ink);overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .2em}
h2{font-size:1.2rem;margin:2.2em 0 .6em;padding-bottom:.2em;border-bottom:1px solid var(--edge)}
p{margin:.5em 0;max-width:48rem}
.soft{color:var(--soft);margin-top:0}.warn{color:var(--bad)}
.verdict{background:var(--card);border-left:.4rem solid var(--good);border-radius:.4rem;
padding:.7rem 1rem;margin:1.2rem 0}
.verdict.watch{border-color:var(--watch)}.verdict.bad{border-color:var(--bad)}
.verdict p:first-child{font-size:1.1rem;font-weight:600}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));
gap:1rem;align-items:start}
figure{margin:0;padding:.8rem .8rem .4rem;background:var(--card);border-radius:.4rem;
break-inside:avoid;max-width:34rem}
figcaption{font-weight:600}
.key{list-style:none;margin:.1rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:0 1rem;
font-size:.85rem;color:var(--soft)}
.key li::before{content:"";display:inline-block;width:.75em;height:.75em;border-radius:.15em;
margin-right:.4em;background:currentColor}
.key li span{color:var(--ink)}
.axis{font-size:.8rem;color:var(--soft);line-height:1.2;margin-top:.3rem}
.axis.below{text-align:center;margin:0 0 .3rem}
.wide{overflow-x:auto;margin:.8rem 0;max-width:100%}
table{border-collapse:collapse;font-size:.92rem}
td,th{border-bottom:1px solid var(--edge);padding:.3em .8em .3em 0;text-align:left;
vertical-align:top;max-width:36rem;overflow-wrap:break-word}
td.text{min-width:13rem}
th{color:var(--soft);font-weight:600}th.number{text-align:right}
td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
.facts td:first-child{color:var(--soft)}
td.heat{background:color-mix(in srgb,var(--c0) calc(var(--share)*70%),transparent)}
summary{cursor:pointer;color:var(--soft)}
pre{background:var(--card);padding:.8rem;border-radius:.4rem;overflow-x:auto;font-size:.85rem}
svg{display:block;width:100%;height:auto;font:12px system-ui,sans-serif}
svg text{fill:var(--soft);stroke:none}
svg .background{fill:none}
svg .axis .line{stroke:var(--soft);fill:none}svg .axis .guide.line{stroke:var(--edge)}
svg .vertical .axis.x .guide,svg .horizontal .axis.y .guide{stroke:none}
svg .axis.x text,svg .title{text-anchor:middle}svg .axis.y text{text-anchor:end}
svg .series .line{fill:none;stroke-width:2}svg .dot{stroke:none}svg .rect{stroke:none}
"""
    + "".join(
        f"svg .color-{number}{{fill:var(--c{number});stroke:var(--c{number})}}"
        f".key .c{number}{{color:var(--c{number})}}\n"
        for number in range(7)
    )
    + """
@media (max-width:36rem){body{font-size:15px}h1{font-size:1.3rem}figure{padding:.6rem .5rem .2rem}}
@media print{:root{color-scheme:light;--ground:#fff;--card:#fff;--ink:#000;--soft:#444;
--edge:#bbb;--good:#00805d;--bad:#b3261e;--watch:#9a5b00;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b0508a;--c4:#a37a00;--c5:#3b9bd0;--c6:#7a7a7a}
body{font-size:10.5pt;padding:0;max-width:none}figure,.verdict{border:1px solid var(--edge)}
.verdict{border-left-width:.4rem}.plots{grid-template-columns:1fr 1fr}
h2{break-after:avoid}tr{break-inside:avoid}.wide{overflow:visible}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)
