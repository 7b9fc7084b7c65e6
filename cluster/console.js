// The console: a chat over /v1/chat/completions, and the picture that /console/state gives once a second.
// Text of a model, of a worker or of an error only ever becomes a text node.
'use strict';

const THEME = 'lightship.theme';
const KEY = 'lightship.key';
const POLL_MS = 1000;
const STALE_MS = 10_000; // after which a gateway that is not heard of is left out
const NUM_POINTS = 60; // of the curve of tokens per second
const NUM_REQUESTS = 16; // shown of the last ones
const PHASES = ['queue', 'prefill', 'ship', 'decode'];

const systemTheme = matchMedia('(prefers-color-scheme: dark)');
const theme = () => document.documentElement.dataset.theme ?? (systemTheme.matches ? 'dark' : 'light');
if (localStorage.getItem(THEME)) document.documentElement.dataset.theme = localStorage.getItem(THEME);

// Small helpers

const byId = (id) => document.getElementById(id);
const count = (number) => Math.round(number).toLocaleString('en');
const counted = (number, word) => `${count(number)} ${word}${number === 1 ? '' : 's'}`;

/** An element with attributes and children; a child that is a string becomes text. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function seconds(value) {
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return value < 60 ? `${value.toFixed(value < 10 ? 2 : 1)} s` : `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
}

/** Exact dollars, without the zeros at the end that say nothing. */
const dollars = (cost) => '$' + cost.replace(/(\.\d{2,}?)0+$/, '$1');

function headers(more = {}) {
  const key = byId('key').value.trim();
  return key ? { ...more, authorization: `Bearer ${key}` } : more;
}

/** What went wrong, as a sentence, with the request's id. */
class Failure extends Error {
  constructor(sentence, id = null) {
    super(sentence);
    this.id = id;
  }

  static async of(response) {
    let sentence = `The gateway answered with status ${response.status}.`;
    try {
      const error = (await response.json()).error;
      sentence = asSentence(error.message);
    } catch {
      // Not one of ours: the status has to do.
    }
    const later = response.headers.get('retry-after');
    if (later) sentence += ` Try again in ${later} s.`;
    if (response.status === 401) byId('key').setAttribute('aria-invalid', 'true');
    return new Failure(sentence, response.headers.get('x-request-id'));
  }
}

function asSentence(text) {
  const trimmed = String(text).trim();
  return trimmed.charAt(0).toUpperCase() + trimmed.slice(1) + (/[.!?]$/.test(trimmed) ? '' : '.');
}

/** The JSON objects of a stream of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Failure('The reply was cut off: the connection closed before its end.');
    const lines = (rest + value).split('\n');
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith('data:')) continue;
      const data = line.slice(5).trim();
      if (data === '[DONE]') return;
      yield JSON.parse(data);
    }
  }
}

// One reply on the page

class ReplyView {
  constructor() {
    this.text = '';
    this.thinkingText = '';
    this.answer = make('div', { class: 'text' });
    this.root = make('article', { class: 'message answer busy', 'aria-label': 'Answer' }, this.answer);
    this.startedAt = performance.now();
    this.firstTokenAt = null;
  }

  progress({ total, cache, processed }) {
    if (!this.reading) {
      this.readingNote = make('p', { class: 'note' });
      this.meter = make('div', { class: 'meter', role: 'progressbar', 'aria-label': 'Reading the prompt', 'aria-valuemin': '0' });
      this.reading = make('div', { class: 'reading' }, this.readingNote, this.meter);
      this.answer.before(this.reading);
    }
    this.meter.setAttribute('aria-valuemax', total);
    this.meter.setAttribute('aria-valuenow', processed);
    showShares(this.meter, [['hit', cache / total], ['read', (processed - cache) / total]]);
    setText(this.readingNote, `Read ${count(processed)} of ${count(total)} prompt tokens, ${count(cache)} of them from the cache`);
  }

  begin() {
    if (this.firstTokenAt !== null) return;
    this.firstTokenAt = performance.now();
    this.reading?.remove();
  }

  think(text) {
    this.begin();
    if (!this.thinking) {
      this.thinkingBody = make('div', { class: 'text' });
      this.thinkingTitle = make('summary', {}, 'Thinking');
      this.thinking = make('details', { class: 'thinking', open: '' }, this.thinkingTitle, this.thinkingBody);
      this.answer.before(this.thinking);
    }
    this.thinkingText += text;
    this.thinkingBody.append(text);
  }

  write(text) {
    this.begin();
    this.endThinking();
    this.text += text;
    this.answer.append(text);
  }

  endThinking() {
    if (!this.thinking || this.thoughtFor) return;
    this.thoughtFor = (performance.now() - this.firstTokenAt) / 1000;
    setText(this.thinkingTitle, `Thought for ${seconds(this.thoughtFor)}`);
    this.thinking.open = false;
  }

  end({ usage, routing, finish, stopped }) {
    this.root.classList.remove('busy');
    this.reading?.remove();
    this.endThinking();
    if (stopped) this.root.append(make('p', { class: 'note' }, 'You stopped this reply. What had been written by then is billed.'));
    if (finish === 'length') this.root.append(make('p', { class: 'note' }, 'The answer reached its longest length.'));
    if (usage) this.root.append(...this.bill(usage));
    if (routing) this.root.append(routeView(routing));
  }

  bill(usage) {
    const { prompt_cache_hit_tokens: hit, prompt_cache_miss_tokens: miss, prompt_tokens: prompt } = usage;
    const entry = (term, value, name = null) => make('div', { class: name }, make('dt', {}, term), make('dd', {}, value));
    const first = this.firstTokenAt === null ? null : (this.firstTokenAt - this.startedAt) / 1000;
    const fromCache = `${Math.round((100 * hit) / prompt)} % of the prompt came from the cache`;
    const meter = make('div', { class: 'meter', role: 'img', 'aria-label': fromCache });
    showShares(meter, [['hit', hit / prompt], ['miss', miss / prompt]]);
    return [
      make('dl', { class: 'bill' },
        first === null ? null : entry('First token', seconds(first)),
        entry('Cache hit', counted(hit, 'token'), 'hit'),
        entry('Cache miss', counted(miss, 'token'), 'miss'),
        entry('Answer', counted(usage.completion_tokens, 'token')),
        entry('Cost', dollars(usage.cost)),
      ),
      meter,
    ];
  }

  fail(failure, again) {
    this.end({});
    const id = failure.id ? make('p', { class: 'note' }, 'Request ', make('code', {}, failure.id)) : null;
    const retry = make('button', { type: 'button', class: 'quiet', onclick: again }, 'Try again');
    this.root.append(make('div', { class: 'error', role: 'alert' }, make('p', {}, failure.message), id, retry));
  }
}

/** Which workers a reply came from, and among which they were chosen. */
function routeView(routing) {
  const { attempts, phases } = routing[0];
  const { prefill, decode, alternatives, num_pairs } = attempts.at(-1);
  const columns = ['Pair', 'Expected', 'Queue', 'Compute', 'Ship', 'Decode step', 'Hits'];
  const rows = alternatives.map((pair, index) =>
    make('tr', { class: index === 0 ? 'chosen' : null },
      make('td', {}, `${pair.prefill} → ${pair.decode}`),
      ...[pair.seconds, pair.queue, pair.compute, pair.ship, pair.decode_step].map((value) => make('td', {}, seconds(value))),
      make('td', {}, count(Math.max(pair.prefill_hit_tokens, pair.decode_hit_tokens))),
    ));
  const restarts = attempts.slice(0, -1).map((attempt) =>
    make('p', {}, `${attempt.prefill} → ${attempt.decode} before: ${attempt.failure}`));
  const took = `It took ${seconds(phases.queue)} in the queue, ${seconds(phases.prefill)} of prefill, ${seconds(phases.ship)} of shipping after the `
    + `first token, ${seconds(phases.total)} in all.`;
  return make('details', { class: 'route' },
    make('summary', {}, `${prefill} → ${decode}, ${num_pairs === 1 ? 'the only pair' : `the best of ${num_pairs} pairs`}`),
    make('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Pairs of workers' },
      make('table', {},
        make('thead', {}, make('tr', {}, ...columns.map((name) => make('th', { scope: 'col' }, name)))),
        make('tbody', {}, ...rows))),
    ...restarts,
    make('p', {}, took));
}

// The chat

class Chat {
  constructor() {
    this.turns = []; // {role, content}
    this.model = null;
    this.running = null; // an AbortController while a reply comes
  }

  async findModel() {
    try {
      const response = await fetch('/v1/models', { headers: headers(), signal: AbortSignal.timeout(5000) });
      if (!response.ok) return;
      const [card] = (await response.json()).data;
      this.model = card.id;
      setText(byId('model'), `${card.id}, ${count(card.max_model_len)} tokens of context`);
    } catch {
      // The picture of the cluster says what is the matter; asked again with the next message.
    }
  }

  body() {
    const system = byId('system').value;
    const temperature = byId('temperature').value;
    const maxTokens = byId('max-tokens').value;
    return {
      model: this.model,
      messages: system.trim() ? [{ role: 'system', content: system }, ...this.turns] : this.turns,
      stream: true,
      stream_options: { include_usage: true },
      return_progress: true,
      thinking: { type: byId('thinking').checked ? 'enabled' : 'disabled' },
      ...(temperature === '' ? {} : { temperature: Number(temperature) }),
      ...(maxTokens === '' ? {} : { max_tokens: Number(maxTokens) }),
    };
  }

  async ask(question) {
    byId('welcome').hidden = true;
    const asked = make('article', { class: 'message question', 'aria-label': 'You' }, make('div', { class: 'text' }, question));
    const reply = new ReplyView();
    byId('thread').append(asked, reply.root);
    this.turns.push({ role: 'user', content: question });
    this.setRunning(new AbortController());
    announce('The reply is coming.');
    asked.scrollIntoView({ block: 'start' });
    const { turns } = this; // of this conversation: a new one may begin meanwhile
    const end = {};
    try {
      await this.read(reply, end);
      this.close(turns, reply, end);
    } catch (error) {
      if (error.name === 'AbortError') this.close(turns, reply, { ...end, stopped: true });
      else this.giveUp(turns, asked, reply, question, error);
    }
    this.setRunning(null);
    follow(true);
  }

  /** Reads the stream into `reply`, and what comes with its end into `end`. */
  async read(reply, end) {
    if (!this.model) await this.findModel();
    const response = await fetch('/v1/chat/completions', {
      method: 'POST',
      headers: headers({ 'content-type': 'application/json', 'x-explain-routing': '1' }),
      body: JSON.stringify(this.body()),
      signal: this.running.signal,
    });
    if (!response.ok) throw await Failure.of(response);
    byId('key').removeAttribute('aria-invalid');
    for await (const event of events(response.body)) {
      const stays = isAtEnd();
      if (event.error) throw new Failure(asSentence(event.error.message), response.headers.get('x-request-id'));
      if (event.prompt_progress) reply.progress(event.prompt_progress);
      for (const { delta, finish_reason } of event.choices) {
        if (delta.reasoning_content) reply.think(delta.reasoning_content);
        if (delta.content) reply.write(delta.content);
        end.finish = finish_reason ?? end.finish;
      }
      end.usage = event.usage ?? end.usage;
      end.routing = event.routing ?? end.routing;
      follow(stays);
    }
  }

  close(turns, reply, end) {
    reply.end(end);
    if (reply.text) turns.push({ role: 'assistant', content: reply.text });
    else turns.pop();
    announce(end.stopped ? 'The reply was stopped.' : `The reply: ${reply.text || 'no text'}`);
  }

  /** The question is no part of the conversation then; it can be asked again. */
  giveUp(turns, asked, reply, question, error) {
    turns.pop();
    const failure = error instanceof Failure ? error : new Failure('The gateway cannot be reached, or the connection was lost.');
    reply.fail(failure, () => {
      if (this.running) return;
      asked.remove();
      reply.root.remove();
      this.ask(question);
    });
    byId('announcement').textContent = '';
  }

  setRunning(controller) {
    this.running = controller;
    const hadFocus = [byId('send'), byId('stop')].includes(document.activeElement);
    byId('send').hidden = controller !== null;
    byId('stop').hidden = controller === null;
    if (hadFocus) byId('prompt').focus();
  }

  reset() {
    this.running?.abort();
    this.turns = [];
    byId('thread').replaceChildren(byId('welcome'));
    byId('welcome').hidden = false;
    byId('prompt').focus();
  }
}

function isAtEnd() {
  const thread = byId('thread');
  return thread.scrollHeight - thread.scrollTop - thread.clientHeight < 60;
}

function follow(stays) {
  if (stays) byId('thread').scrollTop = byId('thread').scrollHeight;
}

function announce(text) {
  byId('announcement').textContent = text;
}

// The picture of the cluster

class Picture {
  constructor() {
    this.gateways = new Map(); // name -> {state, at, rate}: with several, each poll may reach another one
    this.rates = new Array(NUM_POINTS).fill(0);
    this.timer = null;
  }

  async poll() {
    clearTimeout(this.timer);
    if (document.hidden) return;
    try {
      const response = await fetch('/console/state', { headers: headers(), signal: AbortSignal.timeout(5000) });
      if (!response.ok) throw await Failure.of(response);
      byId('key').removeAttribute('aria-invalid');
      this.take(await response.json());
      this.say(null);
    } catch (error) {
      this.say(error instanceof Failure ? error.message : 'The gateway does not answer; trying again.');
    }
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.poll(), POLL_MS);
  }

  take(state) {
    const before = this.gateways.get(state.gateway)?.state;
    const elapsed = before ? state.time - before.time : 0;
    const rate = elapsed > 0 ? Math.max(0, (state.output_tokens - before.output_tokens) / elapsed) : 0;
    const now = performance.now();
    this.gateways.set(state.gateway, { state, rate, at: now });
    for (const [name, { at }] of this.gateways) if (now - at > STALE_MS) this.gateways.delete(name);
    const known = [...this.gateways.values()];
    const states = known.map((one) => one.state);
    const sum = (value) => states.reduce((total, one) => total + value(one), 0);
    this.rates = [...this.rates.slice(1), known.reduce((total, one) => total + one.rate, 0)];
    const requests = states.flatMap((one) => one.requests)
      .sort((a, b) => (b.ended_at ?? Infinity) - (a.ended_at ?? Infinity) || 0);
    showReadiness(state);
    setText(byId('gateway'), states.length > 1 ? `as ${states.length} gateways see it` : `as ${state.gateway} sees it`);
    showRate(this.rates);
    showHits(requests.filter((request) => request.finish !== null));
    setText(byId('in-progress'), count(sum((one) => one.requests_in_progress)));
    setText(byId('queued'), count(sum((one) => one.queued_tokens)));
    showWorkers(state.workers);
    showRequests(requests.slice(0, NUM_REQUESTS));
  }

  say(trouble) {
    byId('trouble').hidden = trouble === null;
    setText(byId('trouble'), trouble ?? '');
    for (const part of document.querySelectorAll('.figures, .card')) part.classList.toggle('stale', trouble !== null);
    if (trouble !== null) setReadiness('bad', 'Not connected');
  }
}

function setReadiness(state, text) {
  byId('readiness').dataset.state = state;
  setText(byId('readiness'), text);
}

function showReadiness({ ready, workers }) {
  const alive = workers.filter((worker) => worker.alive);
  const missing = ['prefill', 'decode'].filter((role) => !alive.some((worker) => worker.role === role));
  if (ready) setReadiness('good', 'Ready');
  else if (missing.length) setReadiness('waiting', `Waiting for a ${missing.join(' and a ')} worker`);
  else if (alive.some((worker) => worker.proven)) setReadiness('waiting', 'Serving, not all workers are ready');
  else setReadiness('waiting', 'Sending a first token through each pair');
}

function showRate(rates) {
  const rate = rates.at(-1);
  setText(byId('rate'), rate > 0 && rate < 10 ? rate.toFixed(1) : count(rate));
  const most = Math.max(...rates, 1);
  const points = rates.map((value, index) => `${index},${(23 - (22 * value) / most).toFixed(2)}`);
  document.querySelector('#spark .curve').setAttribute('d', `M${points.join('L')}`);
  document.querySelector('#spark .area').setAttribute('d', `M0,24L${points.join('L')}L${NUM_POINTS - 1},24Z`);
}

function showHits(ended) {
  const prompt = ended.reduce((total, request) => total + request.prompt_tokens, 0);
  const hit = ended.reduce((total, request) => total + request.hit_tokens, 0);
  setText(byId('hit-rate'), prompt ? `${Math.round((100 * hit) / prompt)} %` : '–');
  setText(byId('hit-note'), prompt ? `of ${counted(ended.length, 'prompt')}` : 'no prompts yet');
}

/** Rows of a table body, one for each item: kept while the item is there, so that nothing jumps and selections stay. */
function showRows(body, items, key, fill) {
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const rows = items.map((item) => {
    const row = old.get(key(item)) ?? make('tr', { 'data-key': key(item) });
    fill(row, item);
    return row;
  });
  if (rows.length !== body.rows.length || rows.some((row, index) => row !== body.rows[index])) body.replaceChildren(...rows);
}

/** Gives `parent` one <i> for each [class, share] that is there, and changes only what has changed. */
function showShares(parent, all) {
  const shares = all.filter(([, share]) => share > 0);
  shares.forEach(([name, share], index) => {
    const part = parent.children[index] ?? parent.appendChild(make('i'));
    part.className = name;
    part.style.width = `${100 * share}%`;
  });
  while (parent.children.length > shares.length) parent.lastChild.remove();
}

function showWorkers(workers) {
  for (const role of ['prefill', 'decode']) {
    showRows(byId(role), workers.filter((worker) => worker.role === role), (worker) => worker.worker, fillWorker);
  }
  byId('no-workers').hidden = workers.length > 0;
  document.querySelector('.workers').hidden = workers.length === 0;
}

function workerState({ alive, draining, pairs, proven }) {
  if (!alive) return ['bad', 'not heard of'];
  if (draining) return ['waiting', 'draining'];
  if (pairs === 0) return ['waiting', 'no counterpart yet'];
  return [proven === pairs ? 'good' : 'waiting', `${proven} of ${counted(pairs, 'pair')} proven`];
}

function fillWorker(row, worker) {
  if (!row.firstChild) {
    const cell = (name) => make('td', { 'data-name': name });
    row.append(
      make('th', { scope: 'row' }, make('code', {}, worker.worker), make('span', { class: 'state' })),
      cell('running'), cell('waiting'), cell('queued'),
      make('td', {}, make('div', { class: 'meter', role: 'img' }), make('div', { class: 'note', 'aria-hidden': 'true' })),
    );
  }
  const [name, running, waiting, queued, pages] = row.children;
  const [state, words] = workerState(worker);
  name.lastChild.dataset.state = state;
  setText(name.lastChild, words);
  setText(running, count(worker.running));
  setText(waiting, count(worker.waiting));
  setText(queued, count(worker.queued_tokens));
  const { held_pages: held, cached_pages: cached, free_pages: free } = worker;
  const all = held + cached + free || 1;
  showShares(pages.firstChild, [['held', held / all], ['cached', cached / all]]);
  pages.firstChild.setAttribute('aria-label', `${count(held)} pages held, ${count(cached)} cached, ${count(free)} free`);
  setText(pages.lastChild, `${count(held)} held, ${count(cached)} cached, ${count(free)} free`);
}

/** Seconds of each phase as far as a request has come; they add up to its total. */
function phasesOf({ phases, read_tokens: read, finish }) {
  const { first_token: first, prefill, ship, total } = phases;
  if (!first) return finish === null && read > 0 ? { prefill: total } : { queue: total };
  const shipped = Math.min(ship, Math.max(0, total - first));
  return { queue: Math.max(0, first - prefill), prefill: Math.min(prefill, first), ship: shipped, decode: Math.max(0, total - first - shipped) };
}

function showRequests(requests) {
  const longest = Math.max(0.001, ...requests.map((request) => request.phases.total));
  showRows(byId('requests'), requests, (request) => request.id, (row, request) => fillRequest(row, request, longest));
  byId('no-requests').hidden = requests.length > 0;
  document.querySelector('.requests').hidden = requests.length === 0;
}

function fillRequest(row, request, longest) {
  if (!row.firstChild) {
    const short = request.id.replace(/^(\w+)-(\w{8})\w*/, '$2');
    row.append(
      make('th', { scope: 'row', title: request.id }, make('code', {}, short), make('span', { class: 'outcome' })),
      make('td', {}, make('div', { class: 'timeline' }, make('div', { class: 'track', role: 'img' }), make('span'))),
      make('td'), make('td'), make('td'),
    );
  }
  const [name, time, hit, answer, cost] = row.children;
  const [track, total] = time.firstChild.children;
  const phases = phasesOf(request);
  const present = PHASES.filter((phase) => phases[phase] > 0);
  row.className = request.finish === null ? 'running' : '';
  setText(name.lastChild, outcome(request));
  name.lastChild.classList.toggle('bad', request.finish === 'error');
  showShares(track, present.map((phase) => [phase, phases[phase] / longest]));
  const told = present.map((phase) => `${phase} ${seconds(phases[phase])}`).join(', ');
  track.setAttribute('aria-label', told);
  track.title = `${told}; ${request.workers.join(' → ')}`;
  setText(total, seconds(request.phases.total));
  setText(hit, request.prompt_tokens ? `${count(request.hit_tokens)} of ${count(request.prompt_tokens)}` : 'shared');
  setText(answer, count(request.output_tokens));
  setText(cost, request.cost === null ? '–' : dollars(request.cost));
}

function outcome({ finish, restarts, phases }) {
  const words = {
    stop: 'complete', length: 'full length', tool_calls: 'tool calls', cancelled: 'cancelled', error: 'failed', orphaned: 'orphaned',
  };
  const now = finish === null ? (phases.first_token ? 'writing' : 'reading') : words[finish];
  return restarts ? `${now}, ${counted(restarts, 'restart')}` : now;
}

// Everything a person can do

function start() {
  const chat = new Chat();
  const picture = new Picture();
  const prompt = byId('prompt');

  const fit = () => {
    prompt.style.height = 'auto';
    prompt.style.height = `${prompt.scrollHeight}px`;
  };
  const send = () => {
    const question = prompt.value.trim();
    if (!question || chat.running) return;
    prompt.value = '';
    fit();
    chat.ask(question);
  };
  byId('composer').addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener('input', fit);
  prompt.addEventListener('keydown', (event) => {
    if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') chat.running?.abort();
  });
  byId('stop').addEventListener('click', () => chat.running?.abort());
  byId('new-chat').addEventListener('click', () => chat.reset());

  const noteSettings = () => {
    const system = byId('system').value.trim();
    setText(byId('settings-note'), system ? `${counted(system.length, 'character')} of system message` : '');
  };
  byId('system').addEventListener('input', noteSettings);
  byId('file').addEventListener('change', async (event) => {
    byId('system').value = await event.target.files[0].text();
    noteSettings();
  });

  const key = byId('key');
  key.value = sessionStorage.getItem(KEY) ?? '';
  key.addEventListener('change', () => {
    sessionStorage.setItem(KEY, key.value.trim());
    picture.poll();
    chat.findModel();
  });

  const nameTheme = () => byId('theme').setAttribute('aria-label', theme() === 'dark' ? 'Use light colours' : 'Use dark colours');
  byId('theme').addEventListener('click', () => {
    const wanted = theme() === 'dark' ? 'light' : 'dark';
    document.documentElement.dataset.theme = wanted;
    localStorage.setItem(THEME, wanted);
    nameTheme();
  });
  systemTheme.addEventListener('change', nameTheme);
  nameTheme();

  document.addEventListener('visibilitychange', () => picture.poll());
  showRate(picture.rates);
  picture.poll();
  chat.findModel();
  prompt.focus();
}

document.addEventListener('DOMContentLoaded', start);
