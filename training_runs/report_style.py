"""The report's style sheet and script: one file, both colour schemes, nothing fetched."""

CSS = """
:root{--bg:#fbfbfa;--card:#fff;--ink:#1b1f24;--soft:#5b6570;--line:#dfe3e8;--grid:#e9ecef;--accent:#0067a3;
--good:#0a7355;--bad:#b3440a;--best:#e3f3ec;--shade:#0002;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#0f1317;--card:#161b21;--ink:#e4e8ec;--soft:#9aa5b1;--line:#2b333c;
--grid:#262d35;--accent:#62b5ec;--good:#4cc9a0;--bad:#f2904f;--best:#15342a;--shade:#000a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Liberation Sans",sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1180px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:clamp(1.5rem,1.1rem + 2vw,2.15rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .3rem;text-wrap:balance}
h2{font-size:1.35rem;letter-spacing:-.01em;margin:3rem 0 .75rem;padding-top:1rem;border-top:1px solid var(--line);
overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:2.25rem 0 .2rem}
h4{font-size:.9rem;margin:.6rem .75rem 0;font-weight:600}
p{max-width:76ch;margin:.5rem 0}
.sub,figcaption,.note,caption{color:var(--soft);font-size:.88rem}
.verdict{background:var(--card);border:1px solid var(--line);border-left:4px solid var(--accent);border-radius:8px;
padding:.8rem 1.1rem;margin:1.25rem 0}
.verdict p{max-width:none}
.arm{font-weight:600;white-space:nowrap}
.q{color:var(--soft);font-variant-numeric:tabular-nums}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(10.5rem,1fr));gap:.75rem;margin:1rem 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem .9rem}
.tiles dt{color:var(--soft);font-size:.82rem}
.tiles dd{margin:.1rem 0 0;font-size:1.55rem;font-weight:600;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
small{display:block;font-size:.76rem;font-weight:400;color:var(--soft);letter-spacing:0;line-height:1.35}
.scroll{overflow-x:auto;margin:1rem 0;border:1px solid var(--line);border-radius:8px}
.scroll{background:linear-gradient(to left,var(--card) 30%,transparent) right/3rem 100% no-repeat local,
linear-gradient(to left,var(--shade),transparent) right/1rem 100% no-repeat scroll,var(--card)}
.scroll:focus-visible,button:focus-visible{outline:2px solid var(--accent);outline-offset:1px}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.6rem .8rem .3rem;position:sticky;left:0;width:max-content;max-width:80vw}
th,td{padding:.42rem .8rem;text-align:right;vertical-align:top;white-space:nowrap;border-top:1px solid var(--line)}
thead th{font-weight:600;vertical-align:bottom;border-top:0;border-bottom:1px solid var(--line)}
th[scope=row],thead th:first-child{text-align:left;position:sticky;left:0;background:var(--card);font-weight:500;
max-width:46vw;white-space:normal;z-index:1}
.keys td,.claims td:nth-child(n+5){white-space:normal}.keys td,.keys th{text-align:left}.keys td{overflow-wrap:anywhere;min-width:14rem}
.main td,.main thead th{padding-left:.5rem;padding-right:.55rem}.main{font-size:.87rem}.main td.best{background:var(--best)}
@media (min-width:900px){th[scope=row]{white-space:nowrap}}
.best{background:var(--best)}.star{color:var(--good);margin-left:.2em;font-size:.8em}
.bad{color:var(--bad);font-weight:600}
td.better small{color:var(--good)}td.worse small{color:var(--bad)}
code{font:.84em/1.5 ui-monospace,"SF Mono",Menlo,"DejaVu Sans Mono",monospace}
figure{margin:.5rem 0 1.5rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:.75rem}
.panel{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.25rem;min-width:0}
.plot{width:100%}
figcaption{margin-top:.5rem;max-width:82ch}
.legend{display:flex;flex-wrap:wrap;gap:.35rem;margin:.75rem 0;padding:0;list-style:none}
.legend.sticky{position:sticky;top:0;z-index:5;background:var(--bg);padding:.5rem 0;border-bottom:1px solid var(--line);
max-height:8.2rem;overflow-y:auto}
.legend button,.tabs button,.key{display:inline-flex;align-items:center;gap:.4rem;font:inherit;font-size:.84rem;color:var(--ink);
background:var(--card);border:1px solid var(--line);border-radius:99px;padding:.22rem .7rem}
.legend button,.tabs button{cursor:pointer;min-height:2rem}
.legend button[aria-pressed=false]{opacity:.45;text-decoration:line-through}
.tabs{display:flex;flex-wrap:wrap;gap:.35rem;margin:.5rem 0}
.tabs button[aria-selected=true]{border-color:var(--accent);color:var(--accent);font-weight:600}
.chip{width:28px;height:14px;vertical-align:-.15em;margin-right:.45em;flex:none}.legend .chip{margin:0}
.key i{width:.85rem;height:.85rem;border-radius:3px}
[hidden]{display:none!important}
@media (max-width:600px){main{padding:1.25rem .8rem 3rem}th,td{padding:.4rem .6rem}.legend.sticky{flex-wrap:nowrap;
overflow-x:auto;scrollbar-width:none}.legend.sticky li{flex:none}
th[scope=row],thead th:first-child{min-width:8.8rem;max-width:39vw;overflow-wrap:anywhere}th .chip{width:22px;height:11px;margin-right:.3em}}
@media print{.legend.sticky{position:static}.scroll{overflow:visible}}
"""

SCRIPT = """
(() => {
  const specs = JSON.parse(document.getElementById("figures").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)"), fine = matchMedia("(pointer: fine)").matches;
  const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const themed = layout => {
    const ink = css("--ink"), grid = css("--grid"), line = css("--line");
    layout.font = {color: ink, size: 12, family: getComputedStyle(document.body).fontFamily};
    layout.hoverlabel = {bgcolor: css("--card"), bordercolor: line, font: layout.font, align: "left"};
    layout.dragmode = fine ? "zoom" : false;
    for (const key of Object.keys(layout).filter(k => /^[xy]axis/.test(k)))
      Object.assign(layout[key], {gridcolor: grid, linecolor: line, tickcolor: line, fixedrange: layout[key].fixedrange || !fine});
    return layout;
  };
  const off = new Map();
  const hide = (plot, section) => plot.data.forEach((trace, i) => {
    if (trace.meta === undefined) return;
    const visible = !(off.get(section) || new Set()).has(trace.meta);
    if ((trace.visible !== false) !== visible) Plotly.restyle(plot, {visible}, [i]);
  });
  const drawn = new Set();
  const draw = plot => {
    if (drawn.has(plot)) return;
    drawn.add(plot);
    const spec = specs[plot.id];
    Plotly.newPlot(plot, spec.data, themed(spec.layout), {responsive: true, displayModeBar: false})
      .then(() => hide(plot, plot.closest("section")));
  };
  const plots = [...document.querySelectorAll(".plot")];
  if ("IntersectionObserver" in window) {
    const watch = new IntersectionObserver(seen => seen.forEach(e => { if (e.isIntersecting) draw(e.target); }),
      {rootMargin: "500px"});
    plots.forEach(plot => watch.observe(plot));
  } else plots.forEach(draw);
  const ahead = plots.filter(plot => plot.offsetParent).slice(0, 16);
  const idle = () => { const plot = ahead.shift(); if (plot) { draw(plot); setTimeout(idle, 50); } };
  setTimeout(idle, 50);
  addEventListener("beforeprint", () => plots.filter(p => p.offsetParent).forEach(draw));
  dark.addEventListener("change", () => drawn.forEach(plot => Plotly.react(plot, plot.data, themed(plot.layout))));
  document.querySelectorAll(".legend button").forEach(button => button.addEventListener("click", () => {
    const section = button.closest("section"), hidden = off.get(section) || new Set(), arm = button.dataset.arm;
    hidden.has(arm) ? hidden.delete(arm) : hidden.add(arm);
    off.set(section, hidden);
    button.setAttribute("aria-pressed", String(!hidden.has(arm)));
    drawn.forEach(plot => { if (section.contains(plot)) hide(plot, section); });
  }));
  document.querySelectorAll(".tabs button").forEach(button => button.addEventListener("click", () => {
    for (const other of button.parentElement.children) {
      const chosen = other === button, panel = document.getElementById(other.getAttribute("aria-controls"));
      other.setAttribute("aria-selected", String(chosen));
      panel.hidden = !chosen;
      const plot = panel.querySelector(".plot");
      if (chosen) { draw(plot); Plotly.Plots.resize(plot); }
    }
  }));
})();
"""
