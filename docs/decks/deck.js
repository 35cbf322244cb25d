const slides = [...document.querySelectorAll("section")];
const [back, on] = document.querySelectorAll("footer button");
const at = () => Math.min(Math.max(parseInt(location.hash.slice(1)) || 1, 1), slides.length);

function show() {
  slides.forEach((slide, number) => { slide.hidden = number + 1 !== at(); });
  document.querySelector("footer span").textContent = slides[at() - 1].dataset.footer;
  document.querySelector("footer output").textContent = `${at()} / ${slides.length}`;
}

function go(step) {  // a vote opens before its result is shown
  const closed = slides[at() - 1].querySelectorAll("details:not([open])");
  if (step === 1 && closed.length) closed.forEach((option) => { option.open = true; });
  else location.hash = Math.min(Math.max(at() + step, 1), slides.length);
}

const STEPS = { ArrowRight: 1, PageDown: 1, " ": 1, ArrowLeft: -1, PageUp: -1, Home: -Infinity, End: Infinity };
addEventListener("keydown", (event) => {
  if (!STEPS[event.key] || event.target.closest("summary, button") && event.key === " ") return;
  event.preventDefault();
  go(STEPS[event.key]);
});
back.addEventListener("click", () => go(-1));
on.addEventListener("click", () => go(1));
addEventListener("hashchange", show);
show();
