"""The look and the captions of the report: light and dark, from a phone to a printed page."""

CSS = """
:root{--ground:#fff;--text:#1c1e21;--muted:#5f656d;--rule:#dcdfe3;--card:#fff;--code:#f3f4f6;--accent:#0072b2;--good:#00734f;--bad:#b24000}
@media(prefers-color-scheme:dark){:root{--ground:#15171a;--text:#e6e8ea;--muted:#a0a7af;--rule:#33383e;--card:#15171a;--code:#22262b;
--accent:#6cb8e6;--good:#4cc79c;--bad:#f0935a}
figure img{filter:invert(.91) hue-rotate(180deg)}}
*{box-sizing:border-box} html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--text);font:16px/1.55 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:2rem 1.25rem 3rem}
h1{font-size:1.7rem;margin:0 0 .5rem;overflow-wrap:anywhere} h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:0 0 .4rem} p,ul{max-width:46rem} li{margin:.25rem 0}
.lead{font-size:1.25rem;border-left:4px solid var(--accent);padding:.3rem 0 .3rem .9rem;margin:1rem 0}
.lead.not-a-line,.lead.hidden-by-precision{border-color:var(--bad)} .lead.extrapolate{border-color:var(--good)}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:.5rem 2rem;margin:0}
.facts div{border-top:1px solid var(--rule);padding-top:.35rem;min-width:0} dt{color:var(--muted);font-size:.85rem}
dd{margin:0;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%;font-size:.93rem} th{text-align:left;color:var(--muted);font-weight:600}
th:nth-child(1),th:nth-child(2){width:21%} th:nth-child(4){width:19%} th:nth-child(5){width:9rem}
th,td{padding:.5rem .9rem .5rem 0;border-bottom:1px solid var(--rule);vertical-align:top;overflow-wrap:anywhere}
.verdict{white-space:nowrap;font-weight:600;color:var(--muted)} .verdict.holds{color:var(--good)}
.verdict.fails{color:var(--bad)}
figure{margin:0 0 2.2rem;padding-top:1rem;border-top:1px solid var(--rule);break-inside:avoid}
figure img{display:block;width:100%;max-width:44rem;height:auto;background:#fff}
figcaption{color:var(--muted);font-size:.9rem;max-width:44rem;margin-top:.5rem}
code{font:.86em ui-monospace,SFMono-Regular,Menlo,monospace;background:var(--code);padding:.08em .3em;border-radius:3px;
overflow-wrap:anywhere} pre{background:var(--code);padding:.9rem 1rem;border-radius:6px;white-space:pre-wrap}
pre code{padding:0;background:none} footer{color:var(--muted);font-size:.85rem;text-align:center;padding:0 1rem 2rem}
@media(max-width:640px){main{padding:1.25rem 1rem 2rem} h1{font-size:1.35rem} .lead{font-size:1.08rem}
thead{display:none} table,tbody,tr,td{display:block;width:100%} tr{border-bottom:1px solid var(--rule);padding:.6rem 0}
td{border:0;padding:.12rem 0} td:first-child{font-weight:600}
td:not(:first-child):not(:empty)::before{content:attr(data-label) ": ";color:var(--muted);font-weight:400}}
@media print{:root{--ground:#fff;--text:#000;--muted:#444;--rule:#bbb;--code:#f3f4f6;--good:#00734f;--bad:#b24000}
figure img{filter:none!important} main{max-width:none;padding:0} h2{break-after:avoid} tr{break-inside:avoid}}
"""

CAPTIONS = {
    "null": (
        "Against a walk of its own",
        (
            "Each dot is a run. The black stroke is a walk without direction that takes the run's"
            " own steps with its momentum; the grey band holds 90 % of the sign-flipped runs. What"
            " lies inside it is no evidence."
        ),
    ),
    "spectrum": (
        "Spectrum",
        (
            "Explained variance ratio of each direction and of the first directions together,"
            " uncentered, beside the walk."
        ),
    ),
    "coefficients": (
        "Coefficients",
        (
            "Position along the first directions. A straight first coefficient proves nothing: the"
            " walk's is nearly as straight."
        ),
    ),
    "variance": (
        "Where it moves",
        "Explained variance ratio of the first direction by layer and module type.",
    ),
    "cosines": (
        "Cosines between updates",
        (
            "How long a direction lasts: on a line all cosines are equal and positive, on a walk"
            " only momentum relates neighbours."
        ),
    ),
    "geometry": ("Turning, drift, update norms", "How straight the path is, step by step."),
    "map": (
        "Backtest",
        (
            "Every cell predicts a recorded step from an earlier prefix. Blue beats keeping the"
            " prefix's last step, red is worse."
        ),
    ),
    "skill": (
        "How far",
        (
            "Skill against standing still by distance, in the run's own past; beyond the right edge"
            " nothing is known."
        ),
    ),
    "forecast": (
        "Forecast",
        (
            "The trajectory model's continuation with 90 % intervals that the run's own past"
            " calibrated; left, a check."
        ),
    ),
    "resolution": ("Resolution", "Shares of the weights that the stored precision lets move."),
    "metrics": (
        "Metrics along the way",
        "What was logged, by step and by position along the first direction.",
    ),
}
"""Heading and caption of every figure, by its anchor."""
