"use strict";
(() => {
  const viewer = document.getElementById("viewer");
  const pairs = [...document.querySelectorAll("button.pair")];
  if (!viewer || !pairs.length) return;
  const [under, over, gap] = ["full", "quantized", "gap"].map((name) => viewer.querySelector("img." + name));
  const slide = viewer.querySelector("input");
  const caption = viewer.querySelector(".said");
  const stage = viewer.querySelector(".stage");
  let shown = 0;

  function cut() {
    stage.style.setProperty("--cut", slide.value + "%");
  }

  function show(number) {
    shown = (number + pairs.length) % pairs.length;
    const pair = pairs[shown];
    const images = pair.querySelectorAll("img");
    [under, over, gap].forEach((image, i) => {
      image.src = images[i].src;
      image.alt = images[i].alt;
    });
    viewer.classList.toggle("small", pair.classList.contains("small"));
    caption.textContent = pair.dataset.said;
  }

  pairs.forEach((pair, number) => {
    pair.addEventListener("click", () => {
      show(number);
      viewer.scrollIntoView({ block: "nearest" });
      slide.focus({ preventScroll: true });
    });
  });
  viewer.querySelector(".before").addEventListener("click", () => show(shown - 1));
  viewer.querySelector(".after").addEventListener("click", () => show(shown + 1));
  slide.addEventListener("input", cut);
  stage.addEventListener("pointermove", (event) => {
    if (event.pointerType === "mouse" && !event.buttons) return;
    const box = stage.getBoundingClientRect();
    slide.value = Math.min(100, Math.max(0, (100 * (event.clientX - box.left)) / box.width));
    cut();
  });
  viewer.hidden = false;
  cut();
  show(0);
})();
