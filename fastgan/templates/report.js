"use strict";
(() => {
  const grids = [...document.querySelectorAll("#grids img")];
  if (grids.length < 2) return;
  const [slider, label, play] = ["slider", "label", "play"].map((id) => document.getElementById(id));
  let timer = 0;
  const show = () => {
    const at = Number(slider.value);
    grids.forEach((grid, place) => { grid.hidden = place !== at; });
    label.textContent = grids[at].dataset.label;
    slider.setAttribute("aria-valuetext", label.textContent);
  };
  const move = (to) => {
    slider.value = to;
    slider.dispatchEvent(new Event("input"));
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    play.textContent = "play";
  };
  slider.addEventListener("input", show);
  slider.addEventListener("pointerdown", stop);
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "stop";
    if (Number(slider.value) === grids.length - 1) move(0);
    timer = setInterval(() => {
      move(Number(slider.value) + 1);
      if (Number(slider.value) === grids.length - 1) stop();
    }, 300);
  });
  // report.html#3 is the page at its fourth grid
  const named = () => {
    const found = /^#(\d{1,4})$/.exec(location.hash);
    if (found) move(Number(found[1]));
  };
  addEventListener("hashchange", named);
  document.getElementById("controls").hidden = false;
  show();
  named();
})();
