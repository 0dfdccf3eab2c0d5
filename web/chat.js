// The chat page. Read it from top to bottom: tools, state, what the browser keeps, server, words,
// session, outbox, line, room, log, composer, rooms, search, dialogs, beginning.
//
// What one writes goes into the outbox, which the browser keeps, and from there to the server over
// HTTP, one after another: so it arrives in order, and is lost neither by a bad network nor with
// the page. What happens in the open room comes over a WebSocket, the line, which does little but
// listen. Every event has a number, and after a loss the line resumes behind the last one that was
// seen. Where there is no line, the newest messages are read over HTTP every few seconds.

// --- Tools

const $ = (id) => document.getElementById(id);
const log = $("log");
const text = $("text");
const touch = matchMedia("(hover: none) and (pointer: coarse)");
const wide = matchMedia("(min-width: 720px)");

// make("p.author", "alice") makes an element. Text stays text, whatever it says.
function make(what, ...children) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  element.classList.add(...classes);
  element.append(...children);
  return element;
}

function makeButton(words, className, action) {
  const button = make(`button.${className}`, words);
  button.type = "button";
  if (action) button.onclick = action;
  return button;
}

// Words that people wrote may be of any script, so their own letters say where they begin.
function makeWords(what, ...words) {
  const element = make(what, ...words);
  element.dir = "auto";
  return element;
}

// Changes what an element says only if it does, so that a screen reader is not told twice.
function put(element, words) {
  if (element.textContent !== words) element.textContent = words;
}

function notice(words) {
  $("notice").replaceChildren(makeWords("p", words));
}

// What somebody asked for may fail; then they are told why.
async function attempt(work) {
  try {
    return await work;
  } catch (problem) {
    if (!(problem instanceof Trouble)) throw problem;
    if (session) notice(problem.message);
    return null;
  }
}

// What the page does by itself is silent: the status tells, and it is done again later.
async function quietly(work) {
  try {
    return await work;
  } catch (problem) {
    if (!(problem instanceof Trouble)) throw problem;
    return null;
  }
}

// --- State

const PAGE = 50; // messages that are read at once
const MOST = 500; // messages that stand on the page at most
const PATIENCE = 10_000; // milliseconds that an answer may take
const QUIET = 20_000; // after so long a silence the line is asked whether it lives
const ECHO = 8_000; // milliseconds that it may take to answer
const NEWS = 5_000; // from one look for news to the next, where there is no line
const LISTS = 10_000; // from one look at the list of rooms to the next; three times that if hidden
const LATE = 2000; // after so long a message is shown as waiting
const ADOPTION = 15_000; // after so long another tab's message is sent from here

let session = null; // { username, token, born, life }; without a token the log-in has ended
let rooms = []; // as the server lists them, kept up to date by the events of the open one
let here = null; // the open room, see enterRoom
let line = null; // its WebSocket, see openLine
let view = null; // the stretch of history on the screen, see showNewest
let draft = { text: "", edit: null }; // what is in the composer, see showDraft
const outbox = new Map(); // by client_id: what the server has not taken yet

let reachable = true; // whether the last request was answered
let listedAt = 0; // when the list of rooms was read
let changingAccount = false; // while one's own doing voids the token

// --- What the browser keeps
// Everything lies under the name of its user. Each message of the outbox is an item of its own, so
// that tabs do not lose each other's. If the browser keeps nothing, this tab remembers it.

const STORE = `chat ${new URL(".", location.href).pathname} `;
const remembered = new Map();

function keep(key, value) {
  remembered.delete(key);
  try {
    if (value === null) localStorage.removeItem(STORE + key);
    else localStorage.setItem(STORE + key, JSON.stringify(value));
  } catch {
    remembered.set(key, value);
  }
}

function recall(key) {
  if (remembered.has(key)) return remembered.get(key);
  try {
    return JSON.parse(localStorage.getItem(STORE + key));
  } catch {
    return null;
  }
}

function keptKeys(start) {
  const keys = [...remembered.keys()];
  try {
    for (const key of Object.keys(localStorage))
      if (key.startsWith(STORE)) keys.push(key.slice(STORE.length));
  } catch {
    // only what this tab remembers
  }
  return keys.filter((key) => key.startsWith(start));
}

function own(key) {
  return `${session.username} ${key}`;
}

// Another tab has kept something.
function hearOtherTab(event) {
  if (!session || !event.key?.startsWith(STORE)) return;
  const key = event.key.slice(STORE.length);
  if (!key.startsWith(own(""))) return;
  const [what, which] = key.slice(own("").length).split(" ");
  const value = event.newValue && JSON.parse(event.newValue);
  if (what === "session") hearSession(value);
  if (what === "outbox") hearOutbox(which, value);
  if (what === "read" && value) takeAsRead(which, value);
  if (what === "draft" && which === here?.room_id) hearDraft(value);
}

// --- Server

class Trouble extends Error {}

// Nothing of ours answered: no network, no server, or a portal in between.
class Unreachable extends Trouble {
  passing = true;

  constructor() {
    super("The server cannot be reached. Check the network, then try again.");
  }
}

// The server answered no.
class Refusal extends Trouble {
  constructor(status, body) {
    super(explain(status, body));
    this.status = status;
    this.detail = body.detail ?? "";
    this.wait = body.retry_after;
    this.passing = [401, 408, 429, 502, 503, 504].includes(status);
  }
}

async function ask(method, path, body, token = session?.token) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body && !(body instanceof URLSearchParams)) {
    headers["Content-Type"] = "application/json";
    body = JSON.stringify(body);
  }
  // A short request outlives the page: who sends and closes the tab has sent.
  const keepalive = method !== "GET" && body?.length < 10_000;
  const signal = AbortSignal.timeout(PATIENCE);
  let reply;
  let answer = {};
  try {
    reply = await fetch(path, { method, headers, body, keepalive, signal });
    if (reply.status !== 204 && reply.status !== 413)
      answer = await reply.json();
  } catch {
    noteReachable(false);
    throw new Unreachable();
  }
  noteReachable(true);
  if (reply.ok) return answer;
  if (reply.status === 401 && token === session?.token) endSession();
  throw new Refusal(reply.status, answer);
}

function noteReachable(now) {
  if (reachable === now) return;
  reachable = now;
  if (now) comeBack();
  paintWaiting();
  showStatus();
}

// There is reason to think that the network is there again.
function comeBack() {
  lineRefusals = 0;
  sendSoon();
  if (here && !line?.opened) connect();
  checkLine();
}

// --- Words

const LABELS = {
  "name or e-mail": "The name",
  email: "The e-mail",
  message: "The message",
  name: "The name",
  new_password: "The new password",
  password: "The password",
  q: "What is searched for",
  username: "The name",
};

// Whether a room is another's or nobody's is told to no stranger.
const CLOSED = "There is no such room, or it is not open to you.";

// Says a refusal in the words of the page: the server speaks of fields, ids and seconds.
function explain(status, { detail }) {
  if (status === 413) return "This is too long.";
  if (/^(there is no such room|this room is not open)/.test(detail))
    return CLOSED;
  const words = (detail ?? `the server answered ${status}`)
    .replace(
      /^([\w -]+): (should|is)/,
      (all, field, verb) => `${LABELS[field] ?? field} ${verb}`,
    )
    .replace(/wait (\d+) s$/, "wait $1 seconds, then try again");
  return `${words[0].toUpperCase()}${words.slice(1)}.`;
}

const timeOfDay = new Intl.DateTimeFormat([], { timeStyle: "short" });
const wholeDate = new Intl.DateTimeFormat("en-GB", { dateStyle: "full" });
const shortDate = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium" });

function nameOfDay(date) {
  const day = new Date(date).setHours(0, 0, 0, 0);
  const days = Math.round((new Date().setHours(0, 0, 0, 0) - day) / 864e5);
  return ["Today", "Yesterday"][days] ?? wholeDate.format(date);
}

// --- Session: the door, and the log-in that goes on
// The session is kept for every tab of its user; each tab remembers who its user is, so that two
// people can sit in two tabs.

function tabUser() {
  try {
    return sessionStorage.getItem(`${STORE}user`) ?? recall("user");
  } catch {
    return recall("user");
  }
}

function rememberTabUser(username) {
  keep("user", username);
  try {
    sessionStorage.setItem(`${STORE}user`, username);
  } catch {
    // the tab asks at the door after a reload
  }
}

async function logIn(account, password) {
  const form = new URLSearchParams({ username: account, password });
  const born = Date.now();
  const login = await ask("POST", "auth/token", form, null);
  const token = login.access_token;
  const { username } = await ask("GET", "users/me", null, token);
  session = { username, token, born, life: login.expires_in * 1000 };
  keepSession();
  rememberTabUser(username);
}

function keepSession() {
  const { token, born, life } = session;
  keep(own("session"), { token, born, life });
}

// While the page is in use, its log-in goes on: a fresh token comes at half the life of the old.
async function renewLogin() {
  if (Date.now() - session.born < session.life / 2) return;
  const born = Date.now();
  const login = await quietly(ask("POST", "auth/renew"));
  if (!login || !session?.token) return;
  takeLogin({
    token: login.access_token,
    born,
    life: login.expires_in * 1000,
  });
  keepSession();
}

function takeLogin(login) {
  const ended = !session.token;
  Object.assign(session, login);
  if (ended) goOn();
  else renewLine();
}

function hearSession(value) {
  if (value?.left) showDoor("");
  else if (value) takeLogin(value);
  else endSession();
}

// The server no longer takes the token. What one reads and types stays where it is, and so does
// the focus: a line above the composer asks for the password.
function endSession() {
  const kept = recall(own("session"));
  if (kept?.token && kept.token !== session.token) {
    takeLogin(kept); // another tab was faster
    return;
  }
  if (!session.token || changingAccount) return;
  session.token = null;
  keep(own("session"), null);
  closeLine();
  put(
    $("again").querySelector("p"),
    `${session.username}, your log-in has ended. Log in again to go on; what you write is kept.`,
  );
  $("again").hidden = false;
  if (!here) showDoor("Your log-in has ended. Log in again to go on.");
  showStatus();
}

// The session goes on, with the same user in the same room.
function goOn() {
  const typing = $("again").contains(document.activeElement);
  $("again").hidden = true;
  $("again").reset();
  if (typing) text.focus();
  if (here) connect();
  sendSoon();
  quietly(loadRooms());
}

function showDoor(words) {
  const username = session?.username ?? "";
  if (session) session.token = null;
  if (here) leaveRoom();
  wipe(); // what was read leaves the page, hidden or not
  $("rooms").replaceChildren();
  $("results").replaceChildren();
  session = null;
  outbox.clear();
  document.querySelectorAll("dialog").forEach((dialog) => dialog.close());
  $("again").hidden = true;
  $("chat").hidden = true;
  $("door").hidden = false;
  $("door").querySelector(".error").textContent = words;
  $("notice").replaceChildren();
  document.title = "Chat";
  if (username) $("username").value = username;
  $(username ? "password" : "username").focus();
}

function showChat() {
  $("door").hidden = true;
  $("chat").hidden = false;
  $("again").hidden = true;
  put($("me"), session.username);
  rooms = [];
  loadOutbox();
  loadMarks();
  paintRooms();
  quietly(loadRooms()).then(() => {
    if (location.hash.slice(1)) route();
    else goHome();
  });
}

async function leaveSession() {
  changingAccount = true;
  try {
    if (session.token) await ask("POST", "auth/logout");
  } finally {
    changingAccount = false;
  }
  keep(own("session"), { left: true });
  showDoor("");
}

// --- Outbox
// Messages and edits wait here until the server has taken them: { client_id, room_id, message,
// made, target?, reason? }. They are sent one at a time, the oldest first, so they arrive in the
// order in which they were written, from whatever room. What is sent again has the same client_id
// and is stored once. What was refused has a reason; it waits for its author and holds nobody up.

let sending = false;
let sendTimer = null;
let sendTries = 0;

function newClientId() {
  const numbers = crypto.getRandomValues(new Uint32Array(4));
  return [...numbers].map((number) => number.toString(36)).join("-");
}

function loadOutbox() {
  outbox.clear();
  const start = own("outbox ");
  for (const key of keptKeys(start)) {
    const entry = recall(key);
    if (entry) outbox.set(key.slice(start.length), entry);
  }
  sendSoon();
}

function hearOutbox(client_id, entry) {
  // Its own tab is about to send it; if that tab is gone, we will.
  if (entry) outbox.set(client_id, { ...entry, adopted: Date.now() });
  else outbox.delete(client_id);
  showOutbox();
}

function inOrder() {
  return [...outbox.values()].sort((one, other) => one.made - other.made);
}

function waitingIn(room_id) {
  return inOrder().filter((entry) => entry.room_id === room_id);
}

function putInOutbox(entry) {
  outbox.set(entry.client_id, entry);
  keep(own(`outbox ${entry.client_id}`), entry);
  showOutbox();
}

function takeFromOutbox(client_id) {
  if (!outbox.delete(client_id)) return;
  keep(own(`outbox ${client_id}`), null);
  showOutbox();
}

function write(message, target) {
  const latest = Math.max(0, ...inOrder().map((entry) => entry.made));
  const made = Math.max(Date.now(), latest + 1); // clocks go back
  const client_id = newClientId();
  putInOutbox({ client_id, room_id: here.room_id, message, target, made });
  setTimeout(paintWaiting, LATE + 100);
  sendSoon();
}

// The author has mended what was refused: it keeps its place, and is sent as something new.
function mend(client_id, message) {
  const { room_id, target, made } = outbox.get(client_id);
  takeFromOutbox(client_id);
  const fresh = newClientId();
  putInOutbox({ client_id: fresh, room_id, message, target, made });
  sendSoon();
}

function nextToSend() {
  const waiting = inOrder().filter((entry) => !entry.reason);
  const ours = ({ adopted = 0 }) => Date.now() - adopted > ADOPTION;
  const last = waiting.findLastIndex(ours);
  return last < 0 ? null : waiting[0]; // whatever is before ours goes before it
}

function sendSoon(seconds = 0) {
  clearTimeout(sendTimer);
  sendTimer = setTimeout(send, seconds * 1000);
}

async function send() {
  if (sending) return;
  sending = true;
  let wait = null;
  try {
    for (let entry; session?.token && (entry = nextToSend());)
      await deliver(entry);
    sendTries = 0;
  } catch (problem) {
    if (!problem.passing) throw problem;
    wait = problem.wait ?? Math.min(30, 2 ** sendTries++);
  } finally {
    sending = false;
  }
  if (wait !== null && session?.token) sendSoon(wait);
}

async function deliver({ client_id, room_id, message, target }) {
  const user = session.username;
  const path = `rooms/${room_id}/messages`;
  try {
    const event = target
      ? await ask("PATCH", `${path}/${target}`, { message })
      : await ask("POST", path, { message, client_id });
    if (session?.username === user) arrive(client_id, event, target);
  } catch (problem) {
    if (problem.passing || !(problem instanceof Trouble)) throw problem;
    const entry = outbox.get(client_id);
    if (entry) putInOutbox({ ...entry, reason: problem.message });
  }
}

// The server has taken it. The line tells the same event, before this or after.
function arrive(client_id, event, target) {
  const shown = event.room_id === here?.room_id && view;
  if (shown && target) change(target, event);
  else if (shown && view.live) add({ ...event, client_id });
  takeFromOutbox(client_id);
}

function showOutbox() {
  const all = inOrder();
  const refused = all.filter((entry) => entry.reason).length;
  const waiting = all.length - refused;
  const words = [];
  if (waiting) words.push(`${waiting} waiting`);
  if (refused) words.push(`${refused} not sent`);
  put($("unsent-summary"), words.join(", "));
  $("unsent-summary").hidden = !words.length;
  $("unsent-summary").classList.toggle("refused", refused > 0);
  if ($("unsent").open) paintUnsent();
  paintWaiting();
  showStatus();
}

// --- Line
// The WebSocket of the open room: { socket, opened, ready, heard, timer, asked, before }. It is
// ready once the server has said hello. Between the loss of one and the next attempt there is none.

let lineTries = 0;
let lineRefusals = 0; // attempts in a row that did not even open
let lineTimer = null;
let sayResumed = ""; // for some seconds after a loss

async function connect() {
  const room = here;
  closeLine();
  if (!session?.token) return;
  showStatus();
  try {
    if (!room.open) await openHistory(room);
    if (room === here && session?.token) openLine();
  } catch (problem) {
    if (!(problem instanceof Trouble)) throw problem;
    if (room === here && !closeIfShut(problem)) connectLater();
  }
}

// First the number up to which the log goes now, then the history: what comes later is after it.
async function openHistory(room) {
  const { room_id, goal } = room;
  const known = entryOf(room_id) ?? (await ask("GET", `rooms/${room_id}`));
  if (room !== here) return;
  room.last = known.seq;
  room.open = true;
  quietly(goal ? showMessage(goal) : showNewest());
}

function openLine() {
  const { room_id, last, epoch } = here;
  const query = new URLSearchParams({ after: last });
  if (epoch) query.set("epoch", epoch);
  const url = new URL(
    `websockets/chat/${room_id}?${query}`,
    location.href.replace(/#.*/, ""),
  );
  url.protocol = url.protocol.replace("http", "ws");
  closeLine();
  const socket = new WebSocket(url);
  const { token } = session;
  const mine = { socket, ready: false, opened: false, heard: Date.now() };
  line = mine;
  // An upgrade that nobody answers is given up.
  mine.timer = setTimeout(() => lostLine(1006), PATIENCE);
  socket.onopen = () => {
    mine.opened = true;
    socket.send(JSON.stringify({ type: "auth", token }));
  };
  socket.onmessage = ({ data }) => hearLine(JSON.parse(data));
  socket.onclose = ({ code }) => lostLine(code);
  showStatus();
}

// A line lasts as long as the log-in with which it was opened: a new one takes its place in time.
function renewLine() {
  if (!line?.ready) return;
  const { socket, asked } = line;
  clearTimeout(asked);
  socket.onmessage = socket.onclose = null;
  line = null;
  openLine();
  line.before = socket;
}

function closeLine() {
  clearTimeout(lineTimer);
  if (!line) return;
  const { socket, timer, asked, before } = line;
  before?.close();
  clearTimeout(timer);
  clearTimeout(asked);
  socket.onmessage = socket.onclose = null;
  // To close one that is just opening is an error in the console; but one that never opens would
  // hold up the next, since browsers open one at a time.
  if (socket.readyState === WebSocket.CONNECTING) {
    socket.onopen = () => socket.close();
    setTimeout(() => socket.close(), 1000);
  } else socket.close();
  line = null;
}

function hearLine(frame) {
  line.heard = Date.now();
  clearTimeout(line.asked);
  line.asked = null;
  receive(frame);
}

function tell(frame) {
  if (line?.ready) line.socket.send(JSON.stringify(frame));
}

// A line may be dead and look alive: the server's pings are hidden from a page. But the server
// answers a frame that it does not know by an error, and any answer shows that the line lives.
function checkLine(silence = 0) {
  if (!line?.ready || line.asked) return;
  if (Date.now() - line.heard < silence) return;
  line.asked = setTimeout(() => lostLine(1006), ECHO);
  tell({ type: "are you there", client_id: "echo" });
}

function lostLine(code) {
  if (line.opened) lineRefusals = 0;
  else lineRefusals += 1;
  closeLine();
  if (changingAccount) return; // it is opened again after that
  here.typing.clear();
  here.lost ??= here.last;
  if (code === 4401) quietly(ask("GET", "users/me")); // ends the session?
  if (code === 4403 || code === 4404) return closeRoom(whyClosed(code - 4000));
  if (code === 4400) here.open = false;
  connectLater(code === 4429 ? 30 : 0);
  quietly(loadRooms());
  return readNews();
}

function connectLater(least = 0) {
  const wait = Math.max(least, Math.min(30, 2 ** lineTries / 2));
  lineTries += 1;
  clearTimeout(lineTimer);
  lineTimer = setTimeout(connect, wait * (500 + 500 * Math.random()));
  showStatus();
}

// Somebody is waiting for the line, so do not.
function connectNow() {
  if (!here || line || !session?.token) return;
  if (Date.now() - here.hurried < 3000) return;
  here.hurried = Date.now();
  connect();
}

// Where there is no line, the newest page of the history is read again and again.
async function readNews() {
  const room = here;
  if (!room?.open || room.reading || !view.live || view.busy) return;
  room.reading = true;
  try {
    const path = `rooms/${room.room_id}/messages?limit=${PAGE}`;
    const page = await ask("GET", path);
    if (room === here && view.live && !view.busy) takeNews(page);
  } catch (problem) {
    if (!(problem instanceof Trouble)) throw problem;
    if (room === here) closeIfShut(problem);
  } finally {
    room.reading = false;
  }
}

function takeNews(page) {
  const newest = Math.max(0, ...numbersShown());
  if (page.length === PAGE && page[0].seq > newest) {
    quietly(showNewest()); // there is more between
    return;
  }
  for (const message of page) {
    const shown = find(message.seq)?.data;
    if (!shown) frames.message(message);
    else if (shown.message !== message.message) change(message.seq, message);
  }
  update();
}

function statusNow() {
  const waiting = inOrder().filter((entry) => !entry.reason).length;
  const verb = waiting === 1 ? "message waits" : "messages wait";
  const wait = waiting ? `, ${waiting} ${verb}` : "";
  if (!session.token) return ["lost", `Logged out${wait}`];
  if (!reachable) {
    const why = navigator.onLine ? "Server out of reach" : "Offline";
    return ["lost", waiting ? why + wait : `${why}, trying again…`];
  }
  if (line?.ready || line?.before)
    return sayResumed ? ["resumed", sayResumed] : ["online", "Connected"];
  if (lineRefusals >= 2)
    return [
      "blocked",
      `No live connection here, looking every ${NEWS / 1000} s`,
    ];
  if (here && here.lost !== null)
    return ["lost", "Connection lost, trying again…"];
  return ["connecting", "Connecting…"];
}

function showStatus() {
  if (!session) return;
  const [state, words] = statusNow();
  update();
  $("status").dataset.state = state;
  put($("status"), words);
}

// --- Room
// The open room: its log is known up to `last`, under `epoch`. Whoever waited for an answer looks
// whether the room is still `here`.

function enterRoom(room_id, goal) {
  leaveRoom();
  const known = {
    role: null,
    open: false, // whether its history is being shown
    last: 0,
    epoch: null,
    goal,
    lost: null,
    hurried: 0,
  };
  const people = { online: new Set(), typing: new Map() }; // until when they type
  here = { room_id, ...known, ...people };
  lineTries = lineRefusals = 0;
  sayResumed = "";
  keep(own("room"), room_id);
  wipe();
  view.live = !goal;
  paintWaiting();
  draft = recall(own(`draft ${room_id}`)) ?? { text: "", edit: null };
  showDraft();
  paintRooms();
  update();
  connect();
  const typing = document.activeElement?.matches("input, textarea, select");
  if (!typing) (touch.matches || !wide.matches ? $("title") : text).focus();
}

function leaveRoom() {
  if (!here) return;
  tellMarks();
  closeLine();
  here = null;
}

function closeIfShut({ status }) {
  if (status !== 403 && status !== 404) return false;
  closeRoom(whyClosed(status));
  return true;
}

function whyClosed(status) {
  if (!here.role) return CLOSED;
  if (status === 404) return "This room was deleted.";
  return "You are no longer in this room.";
}

const shut = new Set(); // rooms that turned out so, where nobody is led by us

// One is not, or no longer, in this room.
function closeRoom(why) {
  const { room_id } = here;
  shut.add(room_id);
  leaveRoom();
  $("about").close();
  if (recall(own("room")) === room_id) keep(own("room"), null);
  notice(why);
  quietly(loadRooms()).then(() => here || goHome());
}

function receive(frame) {
  if (frame.created_at) {
    if (frame.seq <= here.last) return; // seen, over HTTP or before the loss
    here.last = frame.seq;
  }
  frames[frame.type]?.(frame);
  update();
}

const frames = {
  hello({ seq, epoch, role, online }) {
    const missed = seq - here.lost;
    if (here.lost !== null)
      sayAgain(
        missed > 0 ? `caught up on ${missed} missed` : "nothing was missed",
      );
    Object.assign(here, { role, online: new Set(online), lost: null });
    here.epoch ??= epoch;
    shut.delete(here.room_id);
    clearTimeout(line.timer);
    line.before?.close();
    line.before = null;
    line.ready = true;
    lineTries = lineRefusals = 0;
    showStatus();
    sendSoon();
    quietly(loadRooms());
  },
  reset({ seq, epoch }) {
    Object.assign(here, { last: seq, epoch });
    const room = entryOf(here.room_id);
    if (room) room.seq = seq;
    quietly(showNewest());
    sayAgain("history loaded afresh");
  },
  message(event) {
    const ours = event.username === session.username;
    here.typing.delete(event.username);
    countUnread(event, ours);
    if (view.live) add(event);
    else view.stale = true;
    if (ours) takeFromOutbox(event.client_id);
  },
  edit({ target, message, deleted, created_at }) {
    change(target, deleted ? { deleted } : { message, edited_at: created_at });
  },
  delete({ target }) {
    change(target, { deleted: true });
  },
  member({ member, role }) {
    if (member === session.username && role) here.role = role;
    quietly(loadRooms());
    if ($("about").open) quietly(paintAbout());
  },
  typing({ username }) {
    here.typing.set(username, Date.now() + 4000);
    setTimeout(update, 4100);
  },
  presence({ username, online }) {
    if (online) here.online.add(username);
    else here.online.delete(username);
  },
  error({ client_id, detail }) {
    if (client_id !== "echo") notice(explain(400, { detail }));
  },
};

function sayAgain(words) {
  sayResumed = `Back online, ${words}`;
  setTimeout(() => {
    sayResumed = "";
    showStatus();
  }, 20_000);
}

// --- Log
// Messages stand in the order of their numbers, those that have none yet at the end. `view` is the
// stretch that is on the page: `live` if it has the newest message, `complete` if the oldest.

let pinned = true; // the end of the log stays in sight
let lastTop = 0; // where it was scrolled to
let updating = 0;

function wipe() {
  view = {
    live: false,
    complete: false,
    busy: false,
    stale: false,
    changes: new Map(), // for pages that were read before a change and come after it
  };
  log.replaceChildren();
}

function find(seq) {
  return log.querySelector(`.message[data-seq="${seq}"]`);
}

function place(element) {
  return element.data.seq ?? Infinity;
}

async function showNewest() {
  wipe();
  pinned = true;
  view.live = true;
  paintWaiting();
  await loadPage("", "complete");
}

async function showMessage(seq) {
  if (!find(seq)) {
    wipe();
    pinned = false;
    await loadPage(`&before=${seq + PAGE / 2}`, "complete");
  }
  pinned = false;
  log.querySelector(".goal")?.classList.remove("goal");
  find(seq)?.classList.add("goal");
  find(seq)?.scrollIntoView({ block: "center" });
  history.replaceState(null, "", `#${here.room_id}`);
}

// A page that is not full says that the history ends there.
async function loadPage(query, edge) {
  const mine = view;
  mine.busy = true;
  mine.stale = false;
  const path = `rooms/${here.room_id}/messages?limit=${PAGE}${query}`;
  let page;
  try {
    page = await ask("GET", path);
  } catch (problem) {
    setTimeout(freeView, 3000, mine);
    throw problem;
  }
  if (mine !== view) return;
  keepQuiet();
  keepPlace(() => page.forEach(add));
  if (page.length < PAGE && !mine.stale) mine[edge] = true;
  freeView(mine);
}

function freeView(mine) {
  mine.busy = false;
  update();
}

// Old messages are no news: a screen reader is not told of them.
function keepQuiet() {
  log.setAttribute("aria-live", "off");
  setTimeout(() => log.setAttribute("aria-live", "polite"), 500);
}

// Keeps what is being looked at where it is.
function keepPlace(work) {
  const end = (element) => element.offsetTop + element.offsetHeight;
  const top = log.scrollTop;
  const eye = pinned ? null : [...log.children].find((each) => end(each) > top);
  const before = eye && end(eye);
  work();
  if (pinned) log.scrollTop = log.scrollHeight;
  else if (eye?.isConnected) log.scrollTop = top + end(eye) - before;
  lastTop = log.scrollTop;
}

function add(message) {
  const waiting = log.querySelector(
    `.message[data-waiting="${CSS.escape(message.client_id ?? "")}"]`,
  );
  const mine = waiting && message.username === session.username;
  if (find(message.seq)) {
    if (mine) waiting.remove();
    return;
  }
  const changed = { ...message, ...view.changes.get(message.seq) };
  draw(mine ? waiting : make("div"), changed);
}

function change(seq, how) {
  if (how.deleted) how = { ...how, message: undefined };
  view.changes.set(seq, { ...view.changes.get(seq), ...how });
  const element = find(seq);
  if (element) draw(element, { ...element.data, ...how });
  if (how.deleted && draft.edit?.seq === seq) keepEditedText();
}

// What waits in the outbox stands at the end of the log, an edit where its message is.
function paintWaiting() {
  if (!here || !view?.live) return;
  const entries = waitingIn(here.room_id);
  const ids = new Set(entries.map((entry) => entry.client_id));
  for (const element of log.querySelectorAll("[data-waiting]"))
    if (!ids.has(element.dataset.waiting)) element.remove();
  for (const element of log.querySelectorAll(".changing"))
    draw(element, element.data);
  for (const entry of entries) {
    const element = entry.target && find(entry.target);
    if (element) draw(element, element.data);
    else if (!entry.target) drawWaiting(entry);
  }
  update();
}

function drawWaiting(entry) {
  const { client_id, message, made } = entry;
  const selector = `[data-waiting="${CSS.escape(client_id)}"]`;
  const element = log.querySelector(selector) ?? make("div");
  const username = session.username;
  const created_at = new Date(made).toISOString();
  element.dataset.waiting = client_id;
  element.setAttribute("aria-live", "off");
  draw(element, { username, created_at, message, entry });
}

// A message is three things, one after another: author, time, text.
function draw(element, message) {
  const { seq, username, created_at, deleted, edited_at } = message;
  const entry = seq ? editOf(seq) : message.entry;
  const date = new Date(created_at);
  const time = make("time", timeOfDay.format(date));
  time.dateTime = created_at;
  time.title = wholeDate.format(date);
  const words = makeWords("p.text");
  if (deleted) words.append("Message deleted");
  else words.append(...linked(entry?.message ?? message.message));
  const classes = {
    message: true,
    mine: username === session.username,
    waiting: entry && !entry.reason,
    refused: entry?.reason,
    changing: seq && entry,
    deleted,
    edited: edited_at && !deleted,
    goal: element.matches(".goal"),
  };
  element.className = Object.keys(classes)
    .filter((each) => classes[each])
    .join(" ");
  element.data = message;
  element.setAttribute("role", "article");
  element.tabIndex = -1;
  if (seq) {
    element.dataset.seq = seq;
    delete element.dataset.waiting;
  }
  const focused = element.contains(document.activeElement);
  element.replaceChildren(
    makeWords("p.author", username),
    make("p.when", time),
    words,
  );
  if (entry?.reason || (entry && isLate(entry))) element.append(noteOn(entry));
  if (seq && !deleted && !entry) element.append(makeActions(message));
  if (focused) element.focus();
  putInPlace(element);
}

function editOf(seq) {
  return waitingIn(here.room_id).findLast((entry) => entry.target === seq);
}

// A message that is taken at once is not called waiting.
function isLate({ made }) {
  return !reachable || !session.token || Date.now() - made > LATE;
}

function noteOn(entry) {
  const { client_id, message, reason } = entry;
  if (!reason) return make("p.note", "Waiting to be sent");
  return make(
    "p.note",
    `Not sent: ${reason} `,
    makeButton("Mend", "plain", () =>
      startEditing({ client_id, text: message }),
    ),
    makeButton("Throw away", "plain", () => throwAway(client_id)),
  );
}

function makeActions({ seq, message }) {
  const path = `rooms/${here.room_id}/messages/${seq}`;
  const edit = makeButton("Edit", "edit", () =>
    startEditing({ seq, text: message }),
  );
  const erase = makeButton("Delete", "delete");
  twice(erase, "Really delete?", () => attempt(ask("DELETE", path)));
  return make("div.actions", edit, erase);
}

function putInPlace(element) {
  let next = null;
  for (let each = log.lastChild; each; each = each.previousSibling) {
    if (each === element) continue;
    if (!comesAfter(each, element)) break;
    next = each;
  }
  if (!element.isConnected || next !== element.nextSibling)
    log.insertBefore(element, next);
  arrange(element);
  if (element.nextSibling) arrange(element.nextSibling);
}

function comesAfter(one, other) {
  if (one.data.seq || other.data.seq) return place(one) > place(other);
  return one.data.entry.made > other.data.entry.made;
}

// A day's first message says the day; another of the same author soon after, not the name again.
function arrange(element) {
  const before = element.previousSibling?.data;
  const now = new Date(element.data.created_at);
  const then = new Date(before?.created_at);
  const sameDay = then.toDateString() === now.toDateString();
  const sameAuthor = before?.username === element.data.username;
  element.dataset.day = sameDay ? "" : nameOfDay(now);
  element.classList.toggle("cont", sameDay && sameAuthor && now - then < 3e5);
}

// Links end where people mean: brackets that were opened in them belong, punctuation does not.
const LINK =
  /https?:\/\/(?=[\p{L}\p{N}[])[^\s<>"“”„«»‘\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65]+/giu;
const TRAILING = /[.,;:!?'’…،؛؟।]$/u;
const BRACKETS = { ")": "(", "]": "[", "}": "{" };

function endOfLink(link) {
  for (;;) {
    const last = link.at(-1);
    const count = (sign) => link.split(sign).length;
    const open = BRACKETS[last];
    const unbalanced = open && count(last) > count(open);
    if (!unbalanced && !TRAILING.test(link)) return link;
    link = link.slice(0, -1);
  }
}

function linked(message) {
  const parts = [];
  let done = 0;
  for (const { 0: match, index } of message.matchAll(LINK)) {
    const href = endOfLink(match);
    if (!URL.canParse(href)) continue;
    const link = make("a", href);
    Object.assign(link, { href, target: "_blank", rel: "noopener noreferrer" });
    parts.push(message.slice(done, index), link);
    done = index + href.length;
  }
  return [...parts, message.slice(done)];
}

function below() {
  return log.scrollHeight - log.scrollTop - log.clientHeight;
}

// Whatever happened, the page is brought up to date once, before it is painted.
function update() {
  updating ||= (document.hidden ? setTimeout : requestAnimationFrame)(refresh);
}

function refresh() {
  updating = 0;
  if (!here) return;
  trimLog();
  const visible = !document.hidden && log.clientHeight;
  const inSight = pinned && view.live && !view.busy && visible;
  if (inSight) seeNewest();
  showPeople();
  const unread = entryOf(here.room_id)?.unread;
  $("newest").hidden = pinned && view.live;
  put($("newest"), unread ? `↓ ${unread} new` : "↓ Newest");
  $("empty").hidden = !view.complete || Boolean(log.firstChild);
  log.classList.toggle("moderated", ["moderator", "owner"].includes(here.role));
  loadMore();
}

// A long log loses the end that is further away.
function trimLog() {
  if (!pinned && log.childElementCount <= MOST) return;
  const upwards = !pinned && log.scrollTop < below();
  const [end, edge] = upwards
    ? ["lastChild", "live"]
    : ["firstChild", "complete"];
  keepPlace(() => {
    for (; log.childElementCount > MOST; view[edge] = false) log[end].remove();
    if (log.firstChild) arrange(log.firstChild);
  });
}

function numbersShown() {
  return [...log.children].map((each) => each.data.seq).filter(Boolean);
}

function loadMore() {
  if (view.busy || !reachable || !here.open || !log.clientHeight) return;
  const seqs = numbersShown();
  if (!view.complete && log.scrollTop < 600)
    quietly(loadPage(seqs.length ? `&before=${seqs[0]}` : "", "complete"));
  else if (!view.live && below() < 600)
    quietly(loadPage(`&after=${seqs.at(-1) ?? 0}`, "live"));
}

function showPeople() {
  const live = line?.ready || line?.before;
  const names = live ? [...here.online].sort() : [];
  put(
    $("online"),
    names.length ? `${names.length} online: ${names.join(", ")}` : "",
  );
  const now = Date.now();
  const typing = [...here.typing.keys()].filter(
    (name) => here.typing.get(name) > now,
  );
  const verb = typing.length > 1 ? "are" : "is";
  put(
    $("whispers"),
    typing.length ? `${typing.join(" and ")} ${verb} typing…` : "",
  );
}

// --- Composer
// Each room has its draft. While a message is being edited, the draft waits behind it.

function showDraft() {
  text.value = (draft.edit ?? draft).text;
  $("editing").hidden = !draft.edit;
  const what = draft.edit?.client_id
    ? "Mending what was not sent"
    : "Editing a message";
  put($("editing").firstElementChild, what);
  put($("send"), draft.edit ? "Save" : "Send");
  grow();
}

function keepDraft() {
  const empty = !draft.text && !draft.edit;
  keep(own(`draft ${here.room_id}`), empty ? null : draft);
}

function hearDraft(value) {
  if (document.hasFocus() && document.activeElement === text) return;
  draft = value ?? { text: "", edit: null };
  showDraft();
}

function grow() {
  text.style.height = "auto";
  text.style.height = `${text.scrollHeight}px`;
  text.classList.toggle("full", text.scrollHeight > text.clientHeight + 1);
  update();
}

function startEditing(edit) {
  draft.edit = edit;
  keepDraft();
  showDraft();
  text.focus();
}

function stopEditing() {
  draft.edit = null;
  keepDraft();
  showDraft();
}

// What was being edited is gone, but not what was typed.
function keepEditedText() {
  draft.text = [draft.edit.text, draft.text].filter(Boolean).join("\n");
  stopEditing();
}

function throwAway(client_id) {
  takeFromOutbox(client_id);
  if (draft.edit?.client_id === client_id) stopEditing();
}

function submit() {
  const { edit } = draft;
  const message = text.value.trimEnd();
  if (!message.trim()) return;
  if (edit) {
    stopEditing();
    if (edit.seq && find(edit.seq)?.data.message !== message)
      write(message, edit.seq);
    if (edit.client_id && outbox.has(edit.client_id))
      mend(edit.client_id, message);
    return;
  }
  draft.text = "";
  keepDraft();
  showDraft();
  pinned = true;
  if (!view.live && here.open) quietly(showNewest());
  write(message);
}

let toldTyping = 0;

text.oninput = () => {
  (draft.edit ?? draft).text = text.value;
  keepDraft();
  grow();
  checkLine(5000);
  connectNow();
  if (draft.edit || !text.value || Date.now() - toldTyping < 2500) return;
  toldTyping = Date.now();
  tell({ type: "typing" });
};

// On a touch screen Enter makes a new line, since there is no other key for it.
text.onkeydown = (event) => {
  if (event.isComposing || event.keyCode === 229) return;
  const { key, shiftKey, ctrlKey, metaKey } = event;
  const sends = ctrlKey || metaKey || (!shiftKey && !touch.matches);
  const last = [
    ...log.querySelectorAll(".mine[data-seq]:not(.deleted, .changing)"),
  ].at(-1);
  let act = null;
  if (key === "Enter" && sends) act = submit;
  if (key === "Escape" && draft.edit) act = stopEditing;
  if (key === "ArrowUp" && !text.value && last)
    act = () => startEditing({ seq: place(last), text: last.data.message });
  if (!act) return;
  event.preventDefault();
  act();
};

$("composer").onsubmit = (event) => {
  event.preventDefault();
  submit();
};

// The keyboard of a touch screen stays when the button is touched.
$("send").onmousedown = (event) => event.preventDefault();

$("cancel").onclick = () => {
  stopEditing();
  text.focus();
};

// Only the reader's own scrolling up lets go of the end.
log.onscroll = () => {
  pinned = below() < 60 || (pinned && log.scrollTop >= lastTop);
  lastTop = log.scrollTop;
  update();
};

log.onkeydown = (event) => {
  const at = event.target.closest(".message");
  const up = at ? at.previousSibling : log.lastChild;
  const to = { ArrowUp: up, ArrowDown: at?.nextSibling }[event.key];
  if (!to) return;
  event.preventDefault();
  to.focus();
};

$("newest").onclick = () => {
  pinned = true;
  if (!view.live) attempt(showNewest());
  text.focus();
  update();
};

// --- Rooms
// The list, the title with its count, and how far one has read. The address after # says which
// room is open, and maybe which of its messages to show: #lobby/123.

function entryOf(room_id) {
  return rooms.find((room) => room.room_id === room_id);
}

function nameOf(room) {
  const others = room.name
    .split(", ")
    .filter((name) => name !== session.username);
  return room.kind === "direct" && others.length === 1 ? others[0] : room.name;
}

function nameOfId(room_id) {
  const room = entryOf(room_id);
  return room ? nameOf(room) : room_id;
}

async function loadRooms() {
  const user = session.username;
  listedAt = Date.now();
  const list = await ask("GET", "rooms");
  if (session?.username !== user) return;
  rooms = list.filter((room) => room.role !== "banned").map(mergeRoom);
  rooms.sort(
    (one, other) =>
      groupOf(one) - groupOf(other) || nameOf(one).localeCompare(nameOf(other)),
  );
  paintRooms();
  const room = here && entryOf(here.room_id);
  if (room && line?.ready && room.seq > here.last) expectNews(here, room.seq);
}

function groupOf({ role, kind }) {
  if (!role) return 2;
  return kind === "direct" ? 1 : 0;
}

// What is known here may be newer than a list that was on its way.
function mergeRoom(room) {
  const before = entryOf(room.room_id);
  if (before && before.seq > room.seq) {
    room.seq = before.seq;
    room.unread = before.unread;
  }
  if ((recall(own(`read ${room.room_id}`)) ?? 0) >= room.seq) room.unread = 0;
  return room;
}

// The list is ahead of what the line has told: if that stays so, the line is dead.
function expectNews(room, seq) {
  setTimeout(() => {
    if (room === here && line?.ready && room.last < seq) lostLine(1006);
  }, 5000);
}

function countUnread({ seq }, ours) {
  const room = entryOf(here.room_id);
  if (!room || seq <= room.seq) return;
  room.seq = seq;
  room.unread = ours ? 0 : room.unread + 1;
  paintRooms();
}

// What is read here is read in every tab, and the server is told soon.
const marks = new Map();
let markTimer = null;

function seeNewest() {
  const room = entryOf(here.room_id);
  if (!room?.unread || !here.open) return;
  takeAsRead(here.room_id, here.last);
  keep(own(`read ${here.room_id}`), here.last);
  marks.set(here.room_id, here.last);
  markTimer ??= setTimeout(tellMarks, 1000);
}

function takeAsRead(room_id, seq) {
  const room = entryOf(room_id);
  if (!room || seq < room.seq) return;
  room.unread = 0;
  paintRooms();
}

function loadMarks() {
  marks.clear();
  const start = own("read ");
  for (const key of keptKeys(start))
    marks.set(key.slice(start.length), recall(key));
}

async function tellMarks() {
  clearTimeout(markTimer);
  markTimer = null;
  for (const [room_id, seq] of marks) {
    if (!session?.token) return;
    marks.delete(room_id);
    try {
      await ask("PUT", `rooms/${room_id}/read`, { seq });
      if (!marks.has(room_id)) keep(own(`read ${room_id}`), null);
    } catch (problem) {
      if (!(problem instanceof Trouble)) throw problem;
      if (problem.passing && !marks.has(room_id)) marks.set(room_id, seq); // the clock tries again
      if (problem.passing) return;
    }
  }
}

function paintRooms() {
  const items = new Map(
    [...$("rooms").children].map((item) => [item.dataset.room, item]),
  );
  const list = rooms.map((room) => paintRoom(room, items.get(room.room_id)));
  const same =
    list.length === items.size &&
    list.every((item, i) => item === $("rooms").children[i]);
  if (!same) {
    const focused = document.activeElement;
    $("rooms").replaceChildren(...list);
    if (list.some((item) => item.contains(focused))) focused.focus();
  }
  const open = here && entryOf(here.room_id);
  const name = open ? nameOf(open) : "";
  const unread = rooms.reduce((sum, room) => sum + room.unread, 0);
  $("room").hidden = !here;
  if (here) $("nowhere").hidden = true;
  put($("title"), name);
  $("about-button").hidden = !open;
  document.title = `${unread ? `(${unread}) ` : ""}${name ? `${name} · ` : ""}Chat`;
}

function paintRoom(room, item) {
  if (!item) {
    item = make(
      "li",
      make("a", makeWords("span.cut"), make("small"), make("b.badge")),
    );
    item.dataset.room = room.room_id;
    item.firstChild.href = `#${room.room_id}`;
  }
  const link = item.firstChild;
  const [name, hint, badge] = link.children;
  item.className = room.role ? room.kind : "join";
  put(name, nameOf(room));
  link.title = nameOf(room);
  put(hint, hintOn(room));
  put(badge, room.unread ? String(room.unread) : "");
  badge.title = "unread";
  if (room.room_id === here?.room_id) link.setAttribute("aria-current", "page");
  else link.removeAttribute("aria-current");
  return item;
}

function hintOn({ role, kind }) {
  if (!role) return "join";
  return kind === "private" ? "private" : "";
}

function route() {
  if (!session) return;
  const [room_id, seq] = location.hash.slice(1).split("/");
  $("chat").dataset.pane = room_id ? "room" : "rooms";
  if (room_id && room_id !== here?.room_id) enterRoom(room_id, Number(seq));
  else if (room_id && seq) attempt(showMessage(Number(seq)));
  update();
}

// One lands where one was, at first in the Lobby.
function goHome() {
  if (!session) return;
  const last = recall(own("room"));
  const open = rooms.filter((room) => !shut.has(room.room_id));
  const find = (room_id) => open.find((room) => room.room_id === room_id);
  const home = find(last) ?? find("1") ?? open.find(({ role }) => role);
  const room_id = home?.room_id ?? (rooms.length ? "" : (last ?? ""));
  history.replaceState(null, "", `#${room_id}`);
  $("nowhere").hidden = Boolean(room_id);
  paintRooms();
  route();
}

// --- Search

let searchTimer = null;

$("search").oninput = () => {
  clearTimeout(searchTimer);
  searchTimer = setTimeout(search, 250);
};

async function search() {
  const sought = $("search").value.trim();
  $("rooms").hidden = Boolean(sought);
  if (!sought) return showFound("", []);
  const query = new URLSearchParams({ q: sought, limit: PAGE });
  try {
    const found = await ask("GET", `search?${query}`);
    if (sought !== $("search").value.trim()) return null;
    const count =
      found.length < PAGE ? found.length || "Nothing" : `The newest ${PAGE}`;
    return showFound(`${count} found`, found);
  } catch (problem) {
    if (!(problem instanceof Trouble)) throw problem;
    return showFound(problem.message, []);
  }
}

function showFound(words, messages) {
  put($("found"), words);
  $("results").replaceChildren(...messages.map(paintFound));
}

function paintFound({ room_id, seq, username, created_at, message }) {
  const where = makeWords("small", nameOfId(room_id));
  const when = make("small", shortDate.format(new Date(created_at)));
  const words = makeWords("p.text", excerpt(message, $("search").value.trim()));
  const link = make("a", makeWords("b", username), words, where, " · ", when);
  link.href = `#${room_id}/${seq}`;
  return make("li", link);
}

// So much of a long message that what was sought is in sight.
function excerpt(message, sought) {
  const at = message.toLowerCase().indexOf(sought.toLowerCase());
  return at > 80 ? `…${message.slice(at - 40)}` : message;
}

// --- Dialogs: a new room, the room and its people, what was not sent, the account

// What goes wrong in a form is said in it.
function onSubmit(form, action) {
  const error =
    form.querySelector(".error") ??
    form.closest("dialog").querySelector(".error");
  form.onsubmit = (event) => {
    event.preventDefault();
    within(error, action);
  };
}

async function within(error, action) {
  error.textContent = "";
  try {
    await action();
  } catch (problem) {
    if (!(problem instanceof Trouble)) throw problem;
    error.textContent = problem.message;
  }
}

// A button that cannot be undone asks once more.
function twice(button, question, action) {
  const words = button.textContent;
  const calm = () => {
    button.classList.remove("sure");
    button.textContent = words;
  };
  button.onclick = () => {
    if (button.classList.contains("sure")) {
      calm();
      action();
      return;
    }
    button.classList.add("sure");
    button.textContent = question;
  };
  button.onblur = calm;
}

for (const dialog of document.querySelectorAll("dialog")) {
  dialog.querySelector(".close").onclick = () => dialog.close();
}

// Names that begin with what was typed are offered.
async function offerNames(field) {
  const start = field.value.trim().toLowerCase();
  if (!/^[a-z0-9]/.test(start)) return;
  const query = new URLSearchParams({ after: start, limit: 8 });
  const users = (await quietly(ask("GET", `users?${query}`))) ?? [];
  const names = users.map((user) => user.username);
  const fitting = names.filter((name) => name.startsWith(start));
  $("people-names").replaceChildren(
    ...fitting.map((name) => Object.assign(make("option"), { value: name })),
  );
}

function openNewRoom() {
  $("new").querySelector("form").reset();
  $("new").querySelector(".error").textContent = "";
  showKind();
  $("new").showModal();
  $("name").focus();
}

function showKind() {
  const direct = $("kind").value === "direct";
  put($("name-label"), direct ? "Name of the person" : "Name of the room");
  if (direct) $("name").setAttribute("list", "people-names");
  else $("name").removeAttribute("list");
}

async function createRoom() {
  const kind = $("kind").value;
  const name = $("name").value.trim();
  if (kind === "direct") return openDirect(name);
  const { room_id } = await ask("POST", "rooms", { kind, name });
  return openNew(room_id);
}

async function openDirect(username) {
  const body = { kind: "direct", username: username.toLowerCase() };
  const { room_id } = await ask("POST", "rooms", body);
  return openNew(room_id);
}

async function openNew(room_id) {
  $("new").close();
  $("about").close();
  await quietly(loadRooms());
  location.hash = room_id;
}

$("add").onclick = openNewRoom;
$("kind").onchange = showKind;
$("name").oninput = () => $("kind").value === "direct" && offerNames($("name"));
onSubmit($("new").querySelector("form"), createRoom);

const RANKS = { banned: 0, member: 2, moderator: 3, owner: 4 };

async function openAbout() {
  $("about").querySelector(".error").textContent = "";
  $("people").replaceChildren();
  put($("about-title"), nameOfId(here.room_id));
  $("about").showModal();
  await within($("about").querySelector(".error"), paintAbout);
}

async function paintAbout() {
  const room = here;
  const about = await ask("GET", `rooms/${room.room_id}`);
  if (room !== here) return;
  const me = about.members.find(
    (member) => member.username === session.username,
  );
  const owners = about.members.filter((member) => member.role === "owner");
  const group = about.kind !== "direct";
  const rank = RANKS[me?.role] ?? 1;
  const stuck = me?.role === "owner" && owners.length === 1;
  put($("about-title"), nameOf(about));
  $("invite").hidden = !group || rank < RANKS.moderator;
  $("delete-room").hidden = !group || rank < RANKS.owner;
  $("leave-room").hidden = !group || !me || stuck;
  const order = (member) => -RANKS[member.role] || 0;
  about.members.sort((one, other) => order(one) - order(other));
  const focused = document.activeElement?.closest("#people li")?.dataset.name;
  $("people").replaceChildren(
    ...about.members.map((member) =>
      paintPerson(member, { group, rank, stuck }),
    ),
  );
  if (focused)
    $("people")
      .querySelector(`[data-name="${CSS.escape(focused)}"] button`)
      ?.focus();
}

// Only what the server would allow is offered.
function paintPerson({ username, role }, { group, rank, stuck }) {
  const self = username === session.username;
  const owner = rank === RANKS.owner;
  const above = owner || (rank === RANKS.moderator && RANKS[role] < rank);
  const banned = role === "banned";
  const name = makeWords("b.cut", self ? `${username} (you)` : username);
  name.classList.toggle("online", here.online.has(username));
  name.title = username;
  const set = (wanted) => () => changeRole(username, wanted);
  const message = () => withinAbout(() => openDirect(username));
  const buttons = make("div.buttons");
  if (!self && !banned) buttons.append(makeButton("Message", "plain", message));
  if (group && !self && above && banned)
    buttons.append(makeButton("Lift ban", "plain", set(null)));
  if (group && !self && above && !banned)
    buttons.append(
      askTwice("Remove", set(null)),
      askTwice("Ban", set("banned")),
    );
  const choice = group && owner && !banned && !(self && stuck);
  const seat = choice ? chooseRole(username, role) : make("small", role);
  const item = make("li.row", name, seat, buttons);
  item.dataset.name = username;
  return item;
}

function askTwice(words, action) {
  const button = makeButton(words, "plain");
  twice(button, `Really ${words.toLowerCase()}?`, action);
  return button;
}

function chooseRole(username, role) {
  const select = make("select");
  select.setAttribute("aria-label", `Role of ${username}`);
  for (const each of ["member", "moderator", "owner"])
    select.append(new Option(each, each, each === role, each === role));
  select.onchange = () => changeRole(username, select.value);
  return select;
}

function withinAbout(action) {
  return within($("about").querySelector(".error"), action);
}

function changeRole(username, role) {
  const path = `rooms/${here.room_id}/members/${encodeURIComponent(username)}`;
  return withinAbout(async () => {
    try {
      await (role ? ask("PUT", path, { role }) : ask("DELETE", path));
    } finally {
      if (here) await quietly(paintAbout());
    }
  });
}

async function inviteGuest() {
  const guest = $("guest").value.trim().toLowerCase();
  const path = `rooms/${here.room_id}/members/${encodeURIComponent(guest)}`;
  const { role } = await ask("PUT", path, {});
  $("invite").reset();
  await paintAbout();
  if (role === "banned")
    throw new Trouble(`${guest} is banned here. Lift the ban first.`);
}

async function leaveOpenRoom() {
  const { room_id } = here;
  await ask("DELETE", `rooms/${room_id}/members/${session.username}`);
  $("about").close();
  if (here?.room_id === room_id) closeRoom("You have left this room.");
}

async function deleteOpenRoom() {
  const { room_id } = here;
  await ask("DELETE", `rooms/${room_id}`);
  $("about").close();
  if (here?.room_id === room_id) closeRoom("This room was deleted.");
}

$("about-button").onclick = openAbout;
$("guest").oninput = () => offerNames($("guest"));
onSubmit($("invite"), inviteGuest);
twice($("leave-room"), "Really leave it?", () => withinAbout(leaveOpenRoom));
twice($("delete-room"), "Really delete it, with all messages?", () =>
  withinAbout(deleteOpenRoom),
);

function paintUnsent() {
  $("unsent-list").replaceChildren(...inOrder().map(paintEntry));
  if (!outbox.size) $("unsent").close();
}

function paintEntry(entry) {
  const { client_id, room_id, message, reason } = entry;
  const where = makeWords("small", nameOfId(room_id));
  const words = makeWords("p.text", message.slice(0, 300));
  const item = make(reason ? "li.refused" : "li", where, words);
  item.append(
    make("p.note", reason ? `Not sent: ${reason}` : "Waiting to be sent"),
  );
  if (!reason) return item;
  const buttons = make("div.row");
  if (entryOf(room_id))
    buttons.append(makeButton("Mend", "plain", () => mendElsewhere(entry)));
  buttons.append(makeButton("Throw away", "plain", () => throwAway(client_id)));
  item.append(buttons);
  return item;
}

function mendElsewhere({ client_id, room_id, message }) {
  $("unsent").close();
  if (here?.room_id !== room_id) {
    location.hash = room_id;
    enterRoom(room_id);
  }
  startEditing({ client_id, text: message });
}

$("unsent-summary").onclick = () => {
  $("unsent").showModal();
  paintUnsent();
};

async function openAccount() {
  for (const part of $("account").querySelectorAll("details"))
    part.open = false;
  for (const form of $("account").querySelectorAll("form")) form.reset();
  for (const error of $("account").querySelectorAll(".error"))
    error.textContent = "";
  put($("account-title"), session.username);
  $("account").showModal();
  const me = await quietly(ask("GET", "users/me"));
  if (me) put($("account-email"), me.email);
}

// A new password voids every token; this page and its other tabs log in again at once.
async function changePassword() {
  const [password, new_password] = [
    $("old-password").value,
    $("new-password").value,
  ];
  const { username } = session;
  changingAccount = true;
  try {
    await ask("POST", "auth/password", { password, new_password });
    await logIn(username, new_password);
  } finally {
    changingAccount = false;
  }
  $("account").close();
  notice("Your password is changed. Other devices have to log in again.");
  goOn();
}

async function endAccount() {
  changingAccount = true;
  try {
    await ask("DELETE", "users/me", { password: $("last-password").value });
  } catch (problem) {
    if (problem.status !== 409) throw problem;
    throw new Trouble(sayOwned(problem.detail));
  } finally {
    changingAccount = false;
  }
  const keys = keptKeys(own(""));
  keep(own("session"), { left: true });
  keep("user", null);
  showDoor("Your account has ended.");
  keys.forEach((key) => keep(key, null));
  $("username").value = "";
  $("username").focus();
}

// The server lists ids, the page shows names.
function sayOwned(detail) {
  const words = detail.split(/[^a-z0-9_-]+/);
  const owned = rooms.filter((room) => room.role === "owner");
  const names = owned
    .filter((room) => words.includes(room.room_id))
    .map((room) => `“${nameOf(room)}”`);
  return `First give ${names.join(", ")} another owner, or delete what nobody needs.`;
}

$("account-button").onclick = openAccount;
$("logout").onclick = () => attempt(leaveSession());
onSubmit($("change-password"), changePassword);
onSubmit($("end-account"), endAccount);

// --- Beginning

let creating = false; // at the door: a new account, or an old one

function showDoorWay() {
  $("email-label").hidden = !creating;
  $("email").required = creating;
  put($("account-label"), creating ? "Name" : "Name or e-mail");
  put($("come-in"), creating ? "Create account" : "Log in");
  put($("other-way"), creating ? "I have an account" : "Create an account");
  $("password").autocomplete = creating ? "new-password" : "current-password";
  $("door").querySelector(".error").textContent = "";
}

$("other-way").onclick = () => {
  creating = !creating;
  showDoorWay();
  $("username").focus();
};

onSubmit($("door"), async () => {
  const username = $("username").value.trim();
  const password = $("password").value;
  if (creating) {
    const email = $("email").value.trim();
    await ask("POST", "auth/register", { username, email, password }, null);
    creating = false;
    showDoorWay();
  }
  await logIn(username, password);
  $("password").value = "";
  showChat();
});

onSubmit($("again"), async () => {
  await logIn(session.username, $("again-password").value);
  goOn();
});

$("leave-session").onclick = () => attempt(leaveSession());

// The clock: what is due is done, whatever was missed in sleep.
function tick() {
  if (!session?.token) return;
  renewLogin();
  if (Date.now() - listedAt > (document.hidden ? 3 : 1) * LISTS)
    quietly(loadRooms());
  checkLine(QUIET);
  if (!line?.ready) readNews();
  if (marks.size) tellMarks();
  send();
}

// Somebody is back at the page, or the network is.
function wakeUp() {
  updating = 0;
  update();
  if (document.hidden || !session?.token) return;
  quietly(loadRooms());
  checkLine(2000);
  connectNow();
}

setInterval(tick, NEWS);
document.onvisibilitychange = wakeUp;
window.onfocus = wakeUp;
window.ononline = wakeUp;
window.onpageshow = wakeUp;
window.onoffline = () => {
  noteReachable(false);
  if (line) lostLine(1006);
};
window.onpagehide = () => tellMarks();
window.onhashchange = route;
window.onstorage = hearOtherTab;
window.onresize = grow;
new ResizeObserver(grow).observe(log);
if (touch.matches) text.setAttribute("enterkeyhint", "enter");

wipe();
showDoorWay();
const user = tabUser();
const kept = user && recall(`${user} session`);
if (kept?.token) {
  session = { username: user, ...kept };
  showChat();
} else {
  showDoor("");
  if (user) $("username").value = user;
}
