// The player's face, in a notebook (anywidget calls `render`) and in a page of its own (`serve`).
// Python decides everything; this file shows pictures, counts them, and says which keys are down.

const REPEAT = 500;         // ms after which keys that are still held are said again
const KEPT = 200;           // latencies that the live line is computed from
const GRID = ['KeyQ', 'KeyW', 'KeyE', 'KeyA', 'KeyS', 'KeyD'];     // three columns of buttons
const CAPS = {ArrowUp: '↑', ArrowDown: '↓', ArrowLeft: '←', ArrowRight: '→', Space: 'space',
              ShiftLeft: 'shift', Mouse0: 'left button', Mouse1: 'wheel', Mouse2: 'right button'};

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function cap(code) { return CAPS[code] ?? code.replace(/^Key|^Digit/, '').toLowerCase(); }

function quantile(values, share) {
  if (!values.length) return NaN;
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

// A picture as it came over the wire, drawn into a canvas of its own size.
async function decode(part, bytes) {
  if (part.format !== 'rgb') return createImageBitmap(new Blob([bytes], {type: 'image/jpeg'}));
  const image = new ImageData(part.width, part.height);
  for (let from = 0, to = 0; from < bytes.length; from += 3, to += 4) {
    image.data[to] = bytes[from];
    image.data[to + 1] = bytes[from + 1];
    image.data[to + 2] = bytes[from + 2];
    image.data[to + 3] = 255;
  }
  return image;
}

function draw(canvas, part, picture) {
  if (canvas.width !== part.width) canvas.width = part.width;
  if (canvas.height !== part.height) canvas.height = part.height;
  const context = canvas.getContext('2d');
  if (picture instanceof ImageData) context.putImageData(picture, 0, 0);
  else context.drawImage(picture, 0, 0);
}

class Player {
  // transport: send(message), painted(serials), and it calls `take(content, buffers)`.
  constructor(root, transport) {
    this.root = root;
    this.transport = transport;
    this.held = [];                 // codes, in the order they were pressed
    this.press = 0;                 // serial number of the last change of `held`
    this.waiting = new Map();       // serial number: when it was, until a picture knows of it
    this.stats = {painted: 0, dropped: 0, latencies: [], times: [], number: 0, label: ''};
    this.newest = null;             // what the next animation frame draws
    this.serial = 0;                // of the newest picture that came
    this.undrawn = [];              // serial numbers that came since the last drawing
    this.turned = [0, 0];           // of the mouse, not yet sent
    this.build();
    this.listen();
    this.beat = setInterval(() => { if (this.held.length) this.tell(); }, REPEAT);
    this.send({what: 'hello'});
  }

  send(message) { this.transport.send(message); }

  build() {
    this.root.classList.add('nfd-player');
    this.screen = make('canvas', 'nfd-screen');
    this.screen.tabIndex = 0;
    this.screen.dataset.lmSuppressShortcuts = 'true';
    this.hint = make('div', 'nfd-hint', 'click: the keys are yours');
    const frame = make('div', 'nfd-frame');
    frame.append(this.screen, this.hint);
    this.live = make('div', 'nfd-live', '\u00a0');
    this.said = make('div', 'nfd-said', 'waiting for the world');
    this.bar = make('div', 'nfd-bar');
    this.buttons = {};
    for (const [what, text] of [['play', 'Start'], ['step', 'Step'], ['reset', 'Reset'],
                                ['save', 'Save film']]) {
      const button = make('button', `nfd-button nfd-${what}`, text);
      button.onclick = () => {
        this.send({what: what === 'play' && this.playing ? 'pause' : what});
        this.screen.focus();
      };
      this.buttons[what] = button;
      this.bar.append(button);
    }
    this.pad = make('div', 'nfd-pad');
    this.panels = make('div', 'nfd-panels');
    this.settings = make('div', 'nfd-settings');
    const left = make('div', 'nfd-left');
    left.append(frame, this.live, this.said, this.bar, this.pad);
    const right = make('div', 'nfd-right');
    right.append(this.settings, this.panels);
    this.root.append(left, right);
  }

  listen() {
    this.off = new AbortController();
    const on = (target, kind, handler) =>
      target.addEventListener(kind, handler, {signal: this.off.signal});
    on(this.root, 'keydown', event => this.key(event, true));
    on(this.root, 'keyup', event => this.key(event, false));
    on(this.root, 'keypress', event => event.stopPropagation());
    on(this.root, 'focusout', event => {
      const next = event.relatedTarget;             // buttons give the focus back, fields keep it
      if (!this.root.contains(next) || next.matches('input, select')) this.release();
    });
    on(this.screen, 'focus', () => this.hint.classList.add('nfd-gone'));
    on(this.screen, 'blur', () => this.hint.classList.remove('nfd-gone'));
    on(window, 'blur', () => this.release());
    on(document, 'visibilitychange', () => {
      if (document.hidden) this.release();
      else this.send({what: 'hello'});
    });
    on(window, 'pagehide', () => this.close());

    on(this.screen, 'mousedown', event => {
      this.screen.focus();
      if (!this.camera) return;
      event.preventDefault();
      if (document.pointerLockElement === this.screen) this.down(`Mouse${event.button}`);
      else this.screen.requestPointerLock?.();
    });
    on(this.screen, 'mouseup', event => this.up(`Mouse${event.button}`));
    on(this.screen, 'contextmenu', event => { if (this.camera) event.preventDefault(); });
    on(this.screen, 'mousemove', event => this.look(event));
  }

  key(event, isDown) {
    event.stopPropagation();        // no shortcut of the notebook may hear it
    const inField = event.target.matches('input, select');
    if (inField || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!(event.code in (this.codes ?? {}))) return;
    event.preventDefault();
    if (isDown && !event.repeat) this.down(event.code);
    if (!isDown) this.up(event.code);
  }

  down(code) {
    if (!(code in this.codes) || this.held.includes(code)) return;
    this.held.push(code);
    this.changed();
  }

  up(code) {
    if (!this.held.includes(code)) return;
    this.held = this.held.filter(held => held !== code);
    this.changed();
  }

  release() {
    if (!this.held.length) return;
    this.held = [];
    this.changed();
  }

  changed() {
    this.press += 1;
    if (this.playing) this.waiting.set(this.press, performance.now());
    for (const button of this.pad.children) {
      button.classList.toggle('nfd-lit', this.held.includes(button.dataset.code));
    }
    this.tell();
  }

  tell() { this.send({what: 'keys', held: this.held, press: this.press}); }

  look(event) {
    const active = document.pointerLockElement === this.screen;
    if (!this.camera || !active) return;
    if (!this.turned[0] && !this.turned[1]) requestAnimationFrame(() => {
      this.send({what: 'look', x: this.turned[0], y: this.turned[1]});
      this.turned = [0, 0];
    });
    this.turned = [this.turned[0] + event.movementX, this.turned[1] + event.movementY];
  }

  // ---- what Python says

  async take(content, buffers) {
    if (content.menu) this.show_menu(content.menu);
    if (content.state) this.show_state(content.state);
    if (content.file) this.keep(content.file, buffers[0]);
    if (!content.picture) return;
    const parts = [content.picture, ...content.picture.panels];
    const pictures = await Promise.all(parts.map((part, i) => decode(part, buffers[i])));
    const {serial} = content.picture;
    this.undrawn.push(serial);
    if (serial < this.serial) return;               // a newer one was quicker
    this.serial = serial;
    if (this.newest) this.stats.dropped += 1;       // it was never drawn
    else requestAnimationFrame(() => this.paint());
    this.newest = {content: content.picture, parts, pictures};
  }

  paint() {
    const {content, parts, pictures} = this.newest;
    this.newest = null;
    draw(this.screen, parts[0], pictures[0]);
    this.show_panels(parts.slice(1), pictures.slice(1));
    const now = performance.now();
    const stats = this.stats;
    const moved = content.number !== stats.number;
    stats.number = content.number;
    stats.label = content.label;
    stats.drafts = content.drafts;
    stats.made = content.made;
    stats.action = content.action;
    if (moved) {
      stats.painted += 1;
      stats.times = [...stats.times.filter(time => time > now - 2000), now];
    }
    for (const [press, when] of this.waiting) {
      if (press > content.press) continue;
      stats.latencies = [...stats.latencies.slice(1 - KEPT), now - when];
      this.waiting.delete(press);
    }
    this.show_live();
    this.transport.painted(this.undrawn);           // a hidden page draws nothing and gets nothing
    this.undrawn = [];
  }

  show_live() {
    const {number, label, drafts, made, times, latencies} = this.stats;
    const span = times.length > 1 ? times[times.length - 1] - times[0] : NaN;
    const rate = (times.length - 1) / span * 1000;
    const words = [`frame ${number}`, label];
    if (this.playing && span) {
      words.push(`${made.toFixed(1)} made, ${rate.toFixed(1)} painted a second`);
    }
    if (latencies.length) {
      words.push(`key to picture ${quantile(latencies, .5).toFixed(0)} ms ` +
                 `(95 %: ${quantile(latencies, .95).toFixed(0)})`);
    }
    if (drafts) words.push(drafts);
    this.live.textContent = words.join(' · ');
  }

  show_panels(parts, pictures) {
    while (this.panels.children.length > parts.length) this.panels.lastChild.remove();
    parts.forEach((part, i) => {
      if (!this.panels.children[i]) {
        const box = make('figure', 'nfd-panel');
        box.append(make('figcaption'), make('canvas'));
        this.panels.append(box);
      }
      const [caption, canvas] = this.panels.children[i].children;
      caption.textContent = part.caption;
      draw(canvas, part, pictures[i]);
    });
  }

  show_state(state) {
    this.playing = state.playing;
    if (!state.playing) this.waiting.clear();
    this.root.dataset.playing = state.playing;
    this.buttons.play.textContent = state.playing ? 'Pause' : 'Start';
    this.said.replaceChildren(state.said);
    if (state.film) {
      for (const [text, ending] of [['film', '.mp4'], ['GIF', '.gif'], ['record', '.json']]) {
        this.said.append(' · ', this.link(text, state.film + ending));
      }
    }
    this.said.classList.toggle('nfd-bad', state.said.startsWith('stopped'));
    for (const [name, value] of Object.entries(state.values)) {
      const input = this.settings.querySelector(`[name="${name}"]`);
      if (input === null || document.activeElement === input) continue;
      if (input.type === 'checkbox') input.checked = value;
      else input.value = value;
    }
    for (const picture of this.settings.querySelectorAll('.nfd-start')) {
      picture.classList.toggle('nfd-lit', picture.dataset.value === state.values.start);
    }
  }

  // A link to a file that was kept. Where it has no address, it is asked for and comes as bytes.
  link(text, name) {
    const link = make('a', '', text);
    link.href = this.transport.address?.(name) ?? '#';
    link.download = name;
    if (!this.transport.address) link.onclick = event => {
      event.preventDefault();
      this.send({what: 'file', name});
    };
    return link;
  }

  keep(name, bytes) {
    const link = make('a');
    link.href = URL.createObjectURL(new Blob([bytes]));
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  show_menu(menu) {
    this.codes = menu.codes;
    this.camera = menu.camera;
    this.screen.style.aspectRatio = `${menu.width} / ${menu.height}`;
    this.show_pad();
    this.settings.replaceChildren(...menu.controls.map(control => this.control(control)));
  }

  show_pad() {
    const order = code => (GRID.indexOf(code) + 100) % 100;
    const shown = Object.keys(this.codes).filter(code => !code.startsWith('Arrow'));
    shown.sort((a, b) => order(a) - order(b));
    this.pad.replaceChildren(...shown.map(code => {
      const button = make('button', 'nfd-key', `${cap(code)} ${this.codes[code]}`);
      button.dataset.code = code;
      button.tabIndex = -1;
      button.onpointerdown = event => {
        event.preventDefault();
        this.screen.focus();
        this.down(code);
      };
      for (const kind of ['pointerup', 'pointercancel', 'pointerleave']) {
        button.addEventListener(kind, () => this.up(code));
      }
      return button;
    }));
  }

  control(control) {
    const {name, label, kind} = control;
    const set = value => this.send({what: 'set', name, value});
    if (kind === 'start') {
      const row = make('div', 'nfd-starts');
      for (const {value, picture} of control.options) {
        const button = make('button', 'nfd-start');
        button.dataset.value = value;
        button.title = value;
        const image = make('img');
        image.src = picture;
        image.alt = value;
        button.append(image);
        button.onclick = () => { set(value); this.screen.focus(); };
        row.append(button);
      }
      return row;
    }
    const row = make('label', 'nfd-setting');
    const input = make(kind === 'choice' ? 'select' : 'input');
    input.name = name;
    if (kind === 'choice') {
      for (const value of control.options) {
        const option = make('option', '', value);
        option.value = value;
        input.append(option);
      }
      input.onchange = () => { set(input.value); this.screen.focus(); };
    } else if (kind === 'switch') {
      input.type = 'checkbox';
      input.onchange = () => { set(input.checked); this.screen.focus(); };
    } else {
      input.type = 'number';
      Object.assign(input, {min: control.least, max: control.most, step: control.by});
      input.onchange = () => set(input.valueAsNumber);
      input.onkeydown = event => { if (event.key === 'Enter') this.screen.focus(); };
    }
    if (kind === 'switch') row.append(input, label);
    else row.append(make('span', '', label), input);
    return row;
  }

  close() {
    this.release();
    clearInterval(this.beat);
    this.off.abort();
    this.send({what: 'bye'});
    this.transport.close?.();
  }
}

function start(element, transport) {
  const root = make('div');
  element.append(root);
  root.player = new Player(root, transport);
  return root.player;
}

// ---- in a notebook: by the player's own wire if the kernel runs on this machine, else by the
// kernel's. There every message costs some milliseconds, so several drawings are told at once

const NEAR = ['localhost', '127.0.0.1', '[::1]'];
const TOLD = 3;

async function answers(wire) {
  if (!wire || !NEAR.includes(location.hostname)) return false;
  try {
    return (await fetch(`${wire}/player.css`, {signal: AbortSignal.timeout(2000)})).ok;
  } catch (problem) {
    return false;                       // that port is another machine's, or nobody's any more
  }
}

async function render({model, el}) {
  const wire = model.get('wire');
  if (await answers(wire)) {
    const player = serve(el, wire);
    return () => player.close();
  }
  return by_kernel(model, el);
}

function by_kernel(model, el) {
  const view = crypto.randomUUID?.() ?? String(Math.random());
  const send = message => model.send({...message, view});
  let drawn = [];                     // not yet told
  const tell = () => {
    if (drawn.length) send({what: 'painted', serials: drawn});
    drawn = [];
  };
  const late = setInterval(tell, 250);
  const painted = serials => {
    drawn.push(...serials);
    if (drawn.length >= TOLD) tell();
  };
  const player = start(el, {send, painted});
  const hear = (content, buffers) => {
    if (content.to !== view) return;
    player.take(content, buffers.map(part => new Uint8Array(part.buffer ?? part)));
  };
  model.on('msg:custom', hear);
  player.send({what: 'hello'});       // again: now someone listens
  return () => {
    model.off('msg:custom', hear);
    clearInterval(late);
    player.close();
  };
}

export default {render};

// ---- by a wire of its own: the newest message is asked for, and asked for again once it is drawn

const AHEAD = 2;            // pictures that may wait to be drawn before no more are asked for

export function serve(element, base) {
  const view = crypto.randomUUID?.() ?? String(Math.random());
  let open = true;
  let undrawn = 0;
  let drawn = () => {};
  let last = Promise.resolve();

  const post = message => fetch(`${base}/say`, {
    method: 'POST', keepalive: true, body: JSON.stringify({...message, view})}).catch(() => {});
  const player = start(element, {
    send: message => { last = last.then(() => post(message)); },    // in the order they were said
    painted: serials => {
      undrawn -= serials.length;
      drawn();
    },
    address: name => `${base}/film/${name}`,
    close: () => { open = false; }});

  async function listen() {
    while (open) {
      try {
        const answer = await fetch(`${base}/hear?view=${view}`);
        if (answer.status === 204) continue;
        if (!answer.ok) throw new Error(answer.statusText);
        const bytes = await answer.arrayBuffer();
        const length = new DataView(bytes).getUint32(0);
        const content = JSON.parse(new TextDecoder().decode(new Uint8Array(bytes, 4, length)));
        let from = 4 + length;
        const buffers = content.sizes.map(size => {
          from += size;
          return new Uint8Array(bytes, from - size, size);
        });
        if (content.picture) undrawn += 1;
        player.take(content, buffers);
        while (undrawn >= AHEAD) await new Promise(resolve => { drawn = resolve; });
      } catch (problem) {
        player.said.textContent = 'stopped: the program behind this player has ended';
        player.said.classList.add('nfd-bad');
        await new Promise(resolve => setTimeout(resolve, 1000));
        player.send({what: 'hello'});
      }
    }
  }
  listen();
  return player;
}
