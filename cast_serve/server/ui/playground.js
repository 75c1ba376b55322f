// The playground: what is asked, what is answered, how fast, and stopping it.

import { ApiError } from "./api.js";
import { Clock } from "./clock.js";
import { byId, element } from "./dom.js";
import { answer } from "./stream.js";

const composer = byId("composer");
const prompt = byId("prompt");
const send = byId("send");
const stop = byId("stop");
const transcript = byId("transcript");
const NUMBERS = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"];

/** Wire the form up; `onLocked` is called when the server asks for a key. */
export function startPlayground(onLocked) {
  let messages = [];
  let running = null;

  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!running && !send.disabled) ask();
  });
  prompt.addEventListener("keydown", (event) => {
    // Not while an input method is composing a character.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    composer.requestSubmit();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented) running?.abort();
  });
  stop.addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", () => {
    running?.abort();
    messages = [];
    transcript.replaceChildren(byId("empty") ?? emptyNote());
    prompt.focus();
  });
  for (const radio of document.querySelectorAll("[name=mode]")) {
    radio.addEventListener("change", showMode);
  }
  showMode();

  async function ask() {
    const text = prompt.value;
    if (!text.trim()) return;
    const mode = currentMode();
    const turn = { role: "user", content: text };
    const history = messages;
    const body = { ...settings(), ...question(mode, [...history, turn], text) };
    const view = show(mode, text);
    running = new AbortController();
    prompt.value = "";
    setRunning(true);
    const clock = new Clock(performance.now());
    let written = "";
    let finish = null;
    try {
      for await (const piece of answer(mode, body, running.signal)) {
        clock.note(piece);
        written += piece.text;
        finish = piece.finish ?? finish;
        view.add(piece);
      }
    } catch (error) {
      if (running.signal.aborted) {
        finish = "stopped";
      } else {
        view.fail(error.message);
        // What was not answered can be sent again.
        if (!written && !prompt.value) prompt.value = text;
        if (error instanceof ApiError && error.status === 401) onLocked();
      }
    }
    // Unless it was cleared meanwhile.
    if (mode === "chat" && written && messages === history) {
      messages = [...history, turn, { role: "assistant", content: written }];
    }
    view.end(clock.summary(finish));
    byId("announcer").textContent = finish ? `Answer ended: ${clock.tokens ?? 0} tokens.` : "";
    running = null;
    setRunning(false);
  }
}

const currentMode = () => document.querySelector("[name=mode]:checked").value;

function showMode() {
  const chat = currentMode() === "chat";
  byId("prompt-label").textContent = chat ? "Message" : "Text to continue";
  byId("system-label").hidden = !chat;
}

function setRunning(is) {
  const focused = document.activeElement === (is ? send : stop);
  send.hidden = is;
  stop.hidden = !is;
  // A hidden button loses the focus.
  if (focused) (is ? stop : prompt).focus();
}

/** What the form says; what it leaves empty is the server's to choose. */
function settings() {
  const given = { model: byId("model").value };
  for (const name of NUMBERS) {
    const value = composer.elements[name].valueAsNumber;
    if (!Number.isNaN(value)) given[name] = value;
  }
  const stops = composer.elements.stops.value.split("\n").filter(Boolean);
  if (stops.length) given.stop = stops;
  return given;
}

function question(mode, turns, text) {
  if (mode === "completion") return { prompt: text };
  const system = byId("system").value.trim();
  return { messages: system ? [{ role: "system", content: system }, ...turns] : turns };
}

/**
 * An exchange in the transcript, which grows as pieces are added: once a frame, since tokens may
 * come faster than a long text is laid out.
 */
function show(mode, text) {
  const asked = element("p", { class: "asked" }, text);
  const reasoning = element("p", { class: "reasoning quiet" }, "");
  const answered = element("p", { class: "answered" }, "");
  const figures = element("p", { class: "figures quiet" });
  const root = element("article", { class: `exchange ${mode}`, "aria-busy": "true" });
  root.append(asked, reasoning, answered, figures);
  byId("empty")?.remove();
  transcript.append(root);
  follow(true);
  const unseen = { reasoning: "", text: "" };
  let frame = null;
  function draw() {
    cancelAnimationFrame(frame);
    frame = null;
    const atEnd = isAtEnd();
    reasoning.firstChild.appendData(unseen.reasoning);
    answered.firstChild.appendData(unseen.text);
    unseen.reasoning = unseen.text = "";
    follow(atEnd);
  }
  return {
    add(piece) {
      unseen.reasoning += piece.reasoning;
      unseen.text += piece.text;
      frame ??= requestAnimationFrame(draw);
    },
    fail(message) {
      figures.before(element("p", { class: "error", role: "alert" }, message));
      follow(true);
    },
    end(summary) {
      draw();
      const atEnd = isAtEnd();
      root.removeAttribute("aria-busy");
      figures.textContent = summary;
      follow(atEnd);
    },
  };
}

const emptyNote = () =>
  element("p", { id: "empty", class: "quiet" }, "Answers appear here as the model writes them.");

const isAtEnd = () =>
  transcript.scrollHeight - transcript.scrollTop - transcript.clientHeight < 40;

function follow(really) {
  if (really) transcript.scrollTop = transcript.scrollHeight;
}
