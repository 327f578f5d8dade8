"""What a report says of itself: each protocol and metric in a sentence, and the style sheet of the page."""

PROTOCOLS = {
    "next_item": "next_item: leave one out by time. Models learn from all but the last two positives of each user, are tuned on the last but one, "
    "then told all but the last, and rank the whole catalogue for it; what the user had is filtered out.",
    "top_n": "top_n: each user's events are dealt 8:1:1 at random (as RecBole does). Models learn from the first part; the whole catalogue is ranked "
    "with the first two parts filtered out, against all test items of the user. Splits of several seeds are averaged. Nothing here says how a model "
    "fares with time.",
    "time": "time: the log is cut at an instant, and nothing after it is seen by any feature, count or model. Users are asked as of their first event "
    "after the cut, and judged by all new items they then took. The only protocol behind a claim about production.",
    "ncf": "ncf: each user's last positive stands against given or drawn negatives, not against the catalogue. Figures are sampled: they are higher than, "
    "and may order models otherwise than, those over the whole catalogue, and serve comparison with papers that used the same lists alone.",
    "ctr": "ctr: the log's own rows, each with what was known just before it; rankers say how probable the label is.",
}
METRICS = {
    "ndcg": "Gain of hits discounted by 1/log2(rank + 1), over that of an ideal list of min(sought, k) items.",
    "recall": "Share of the sought items in the first k; of rows from a threshold on: share of the positives said yes to.",
    "hit": "Whether any sought item is in the first k (HR).",
    "mrr": "1 / rank of the first hit, 0 beyond k.",
    "precision": "Share of the first k that was sought; of rows: share of the yeses that are positive.",
    "f1": "Harmonic mean of precision and recall.",
    "map": "Mean precision at the places of hits.",
    "coverage": "Share of the catalogue that stands in at least one list of ten.",
    "gini": "How unevenly the places of all lists fall on items: 0 evenly, 1 on one item.",
    "novelty": "Mean -log2 of the share of training events that an item has, in bits.",
    "long_tail": "Share of the list outside the most popular fifth of items.",
    "popularity": "Mean training events of the items of a list.",
    "popularity_lift": "How much more popular a list is than what its user had: 0 is no popularity bias.",
    "diversity": "1 - mean cosine of two items of a list by the users who had them.",
    "auc": "Probability that a positive row scores above a negative one.",
    "gauc": "AUC within each user, weighted by rows, over users with both classes.",
    "logloss": "Mean negative log-likelihood, in nats.",
    "calibration": "Predicted over observed positives: 1 is calibrated.",
    "calibration_error": "Mean gap between predicted and observed rate over bins of probability.",
    "rmse": "Root mean squared error of the rating that the probability stands for (isotonic on validation).",
    "mae": "Mean absolute error of the same rating.",
}
STYLE = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1c2430;--soft:#5b6675;--rule:#e3e7ec;--channel:#2563b0;--stage:#c05310;--baseline:#76808e;--ranker:#2563b0;--lost:#eadfd6}
@media(prefers-color-scheme:dark){:root{--bg:#11151a;--card:#191f27;--ink:#e4e9ef;--soft:#9aa6b4;--rule:#2c3540;--channel:#74aef5;--stage:#f2935a;
--baseline:#95a0ae;--ranker:#74aef5;--lost:#3a2f28}}
*{box-sizing:border-box}body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:62rem;margin:0 auto;padding:0 1rem}header{padding-top:1.6rem}h1{font-size:1.5rem;margin:0 0 .3rem;line-height:1.2;overflow-wrap:anywhere}
header p{margin:.2rem 0 1.2rem;color:var(--soft)}header b{color:var(--ink)}h2{font-size:1.1rem;margin:0 0 .7rem}h3{font-size:1rem;margin:1rem 0 .3rem}
section{background:var(--card);border:1px solid var(--rule);border-radius:10px;padding:1rem;margin:0 0 1rem}
figure{margin:0;max-width:33rem}figcaption,.note{color:var(--soft);font-size:.84rem;margin:.35rem 0 0}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1.2rem}
.small{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.7rem .9rem}
svg{display:block;width:100%;height:auto;overflow:visible}section>svg{max-width:33rem}
svg text{fill:var(--ink);font:11.5px system-ui,-apple-system,"Segoe UI",sans-serif}svg .tick{fill:var(--soft);font-size:10.5px}svg .tiny{fill:var(--soft);font-size:9px}
svg .num{font-variant-numeric:tabular-nums}.grid{stroke:var(--rule)}.zero{stroke:var(--soft)}.curve{fill:none;stroke-width:2}.curve.faint{stroke-width:1;opacity:.4}
.whisker{stroke-width:2;opacity:.55;stroke-linecap:round}.lost{fill:var(--lost)}
circle.channel,rect.channel{fill:var(--channel)}circle.stage,rect.stage{fill:var(--stage)}circle.baseline,rect.baseline{fill:var(--baseline)}circle.ranker,rect.ranker{fill:var(--ranker)}
.curve.channel,.whisker.channel{stroke:var(--channel)}.curve.stage,.whisker.stage{stroke:var(--stage)}.curve.baseline,.whisker.baseline{stroke:var(--baseline)}
.curve.ranker,.whisker.ranker{stroke:var(--ranker)}.curve.baseline{stroke-dasharray:4 3}
svg text.label.channel{fill:var(--channel)}svg text.label.stage{fill:var(--stage)}svg text.label.baseline{fill:var(--soft)}svg text.label.ranker{fill:var(--ranker)}
i{display:inline-block;width:.62rem;height:.62rem;border-radius:50%;margin-right:.45rem}i.channel{background:var(--channel)}i.stage{background:var(--stage)}
i.baseline{background:var(--baseline)}i.ranker{background:var(--ranker)}.legend{margin:0 0 .4rem;font-size:.88rem;color:var(--soft)}.legend span{margin-right:1.1rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.88rem;width:100%;font-variant-numeric:tabular-nums}table.narrow{max-width:33rem}
td,th{padding:.32rem .55rem;text-align:right;border-bottom:1px solid var(--rule);white-space:nowrap;font-weight:400}th[scope=col]{color:var(--soft);font-size:.8rem}
th[scope=row],tr>th:first-child{text-align:left;position:sticky;left:0;background:var(--card)}td.top{font-weight:700}td small{display:block;color:var(--soft);font-size:.72rem;line-height:1}
dt{font-weight:600;margin-top:.4rem}dd{margin:0;color:var(--soft)}summary{cursor:pointer;padding:.5rem 0}pre{overflow-x:auto;font-size:.78rem}
"""
