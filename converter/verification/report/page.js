// Reading values off a plot, with a pointer or with the arrow keys. Without it, nothing is lost
// but this: the plots are drawn already.
for (const plot of document.querySelectorAll(".plot")) {
  const stops = JSON.parse(plot.dataset.stops);
  const svg = plot.querySelector("svg"), cursor = plot.querySelector(".cursor");
  const output = plot.querySelector("output");
  let at = -1;

  const place = (selector, x, y) => {
    const dot = cursor.querySelector(selector);
    dot.setAttribute("visibility", y === null ? "hidden" : "inherit");
    if (y !== null) { dot.setAttribute("cx", `${x}%`); dot.setAttribute("cy", `${y}%`); }
  };
  const show = (index) => {
    at = Math.max(0, Math.min(stops.length - 1, index));
    const [x, error, floor, label] = stops[at];
    const line = cursor.querySelector("line");
    line.setAttribute("x1", `${x}%`);
    line.setAttribute("x2", `${x}%`);
    place(".at-error", x, error);
    place(".at-floor", x, floor);
    cursor.setAttribute("visibility", "visible");
    output.textContent = label;
  };
  const hide = () => {
    cursor.setAttribute("visibility", "hidden");
    output.textContent = "";
  };
  const nearest = (percent) => {
    let best = 0;
    stops.forEach(([x], i) => { if (Math.abs(x - percent) < Math.abs(stops[best][0] - percent)) best = i; });
    return best;
  };

  plot.tabIndex = 0;
  plot.setAttribute("role", "group");
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(nearest(100 * (event.clientX - box.left) / box.width));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: stops.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(to);
  });
}
