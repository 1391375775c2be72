"use strict";
(() => {
  const values = JSON.parse(document.getElementById("values").textContent);
  const at = (id) => document.getElementById(id);
  const store = "study-" + values.study;
  const sheet = at("sheet");
  const small = values.width < 160;
  let state = read();
  let seen = 0;

  function read() {
    try {
      const found = JSON.parse(localStorage.getItem(store));
      if (found && found.study === values.study && found.order.length === values.count) return found;
    } catch (error) { /* begun anew */ }
    return null;
  }

  function keep() {
    try {
      localStorage.setItem(store, JSON.stringify(state));
    } catch (error) { /* answers are kept until the page is closed */ }
  }

  function shuffled(count) {
    const order = Array.from({ length: count }, (_, i) => i);
    for (let i = count - 1; i > 0; i--) {
      const j = Math.floor(Math.random() * (i + 1));
      [order[i], order[j]] = [order[j], order[i]];
    }
    return order;
  }

  function begin() {
    const name = at("rater").value.trim() || "rater-" + Math.random().toString(36).slice(2, 8);
    const order = shuffled(values.count);
    state = { study: values.study, rater: name, order, flips: order.map(() => Math.random() < 0.5), answers: [] };
    keep();
    show();
  }

  function draw(canvas, trial, side) {
    const scale = small ? Math.max(1, Math.floor(480 / values.width)) : 1;
    canvas.width = values.width * scale;
    canvas.height = values.height * scale;
    canvas.classList.toggle("large", !small);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    const x = ((trial % values.columns) * 2 + side) * values.width;
    const y = Math.floor(trial / values.columns) * values.height;
    context.drawImage(sheet, x, y, values.width, values.height, 0, 0, canvas.width, canvas.height);
  }

  function only(name) {
    for (const id of ["start", "trial", "end"]) at(id).hidden = id !== name;
  }

  function show() {
    if (!state) return only("start");
    const number = state.answers.length;
    if (number >= values.count) return only("end");
    only("trial");
    const trial = state.order[number];
    const flip = state.flips[number] ? 1 : 0;
    draw(at("left").querySelector("canvas"), trial, flip);
    draw(at("right").querySelector("canvas"), trial, 1 - flip);
    at("bar").value = number;
    at("where").textContent = number + 1 + " of " + values.count;
    seen = performance.now();
  }

  function answer(side) {
    const number = state ? state.answers.length : values.count;
    if (number >= values.count) return;
    const seconds = Math.round((performance.now() - seen) / 10) / 100;
    state.answers.push({ trial: state.order[number], side, flipped: state.flips[number], seconds });
    keep();
    show();
  }

  function back() {
    if (!state || !state.answers.length) return;
    state.answers.pop();
    keep();
    show();
  }

  function download() {
    const { study, rater, answers } = state;
    const text = JSON.stringify({ study, rater, answers }, null, 1) + "\n";
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = rater.replace(/[^\w.-]+/g, "_") + ".json";
    link.click();
  }

  at("begin").addEventListener("click", begin);
  at("left").addEventListener("click", () => answer("left"));
  at("right").addEventListener("click", () => answer("right"));
  at("download").addEventListener("click", download);
  document.addEventListener("keydown", (event) => {
    if (at("trial").hidden || event.repeat) return;
    const side = { ArrowLeft: "left", ArrowRight: "right" }[event.key];
    if (side) answer(side);
    else if (event.key === "Backspace") back();
    else return;
    event.preventDefault();
  });
  const ready = () => show();
  if (sheet.complete) ready();
  else sheet.addEventListener("load", ready);
})();
