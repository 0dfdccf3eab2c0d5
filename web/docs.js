// The pages of the API: /docs shows openapi.json in Swagger UI, /redoc in ReDoc. Their files come
// from a CDN and are held to their hashes. Without them, the page itself lists the operations.

"use strict";

const CDN = "https://cdn.jsdelivr.net/npm";
const SWAGGER_CSS = {
  name: "swagger-ui.css",
  folder: "swagger-ui-dist@5.35.0",
  hash: "WlYgdmXYOOBWL5apwjDEZwN+U3HmXSSu5R6V5aGxEcf7z+KuRNwBhoxKVN1i3D5I",
};
const SWAGGER_JS = {
  name: "swagger-ui-bundle.js",
  folder: "swagger-ui-dist@5.35.0",
  hash: "gjRm0bEPMeTmMh5jT2cHccIwCUZSTd8YC+j0d0sXw0MdGEfScduGpSyF3ZSSLkX9",
};
const REDOC_JS = {
  name: "redoc.standalone.js",
  folder: "redoc@2.5.4/bundles",
  hash: "w447zOpYfw/1Tv/5AK9NfHTlQIqE3RVR6KY62jCyy9zNDgO64cMwGGP1Fj0zJVf5",
};
const PATIENCE = 5000; // milliseconds until the list is shown, should the CDN never answer

const root = document.documentElement;
const main = document.querySelector("main");

// --- Swagger UI and ReDoc

function load({ name, folder, hash }) {
  const url = `${CDN}/${folder}/${name}`;
  const style = name.endsWith(".css");
  const element = document.createElement(style ? "link" : "script");
  const place = style ? { rel: "stylesheet", href: url } : { src: url };
  const pinned = { crossOrigin: "anonymous", integrity: `sha384-${hash}` };
  return new Promise((resolve, reject) => {
    const events = { onload: resolve, onerror: reject };
    Object.assign(element, pinned, place, events);
    document.head.append(element);
  });
}

function emptyPage() {
  main.className = "";
  main.replaceChildren();
  return main;
}

async function showSwagger() {
  await Promise.all([load(SWAGGER_CSS), load(SWAGGER_JS)]);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  root.classList.toggle("dark-mode", dark);
  SwaggerUIBundle({
    url: "openapi.json",
    domNode: emptyPage(),
    deepLinking: true,
    defaultModelsExpandDepth: 0,
    validatorUrl: null,
  });
}

async function showRedoc() {
  await load(REDOC_JS);
  root.classList.add("redoc"); // which knows no dark colours
  Redoc.init("openapi.json", {}, emptyPage());
}

// --- The list of operations

function add(parent, tag, text = "") {
  const element = document.createElement(tag);
  element.textContent = text.replace(/[*`]|^#+ /gm, "");
  parent.append(element);
  return element;
}

function follow(api, node) {
  const names = node.$ref?.slice(2).split("/") ?? [];
  return names.reduce((place, name) => place[name], names.length ? api : node);
}

function fieldNames(api, schema) {
  const { oneOf, allOf = [], properties = {} } = follow(api, schema);
  if (oneOf) return oneOf.map((one) => fieldNames(api, one)).join(" or ");
  const inherited = allOf.map((one) => fieldNames(api, one));
  return [...inherited, ...Object.keys(properties)].join(", ");
}

function addOperation(api, path, method, operation) {
  add(main, "h3", `${method.toUpperCase()} ${path}`);
  add(main, "p", `${operation.summary}. ${operation.description ?? ""}`);
  const shared = api.paths[path].parameters ?? [];
  const parameters = [...shared, ...(operation.parameters ?? [])];
  const named = parameters.map((one) => follow(api, one).name).join(", ");
  if (named) add(main, "p", `Parameters: ${named}`);
  const bodies = Object.entries(operation.requestBody?.content ?? {});
  for (const [type, { schema }] of bodies)
    add(main, "p", `${type}: ${fieldNames(api, schema)}`);
  add(main, "p", `Answers: ${Object.keys(operation.responses).join(", ")}`);
}

async function showList() {
  const api = await (await fetch("openapi.json")).json();
  if (!main.className) return; // the files came after all
  main.replaceChildren();
  add(main, "h1", `${api.info.title} ${api.info.version}`);
  add(main, "pre", api.info.description);
  for (const [path, { parameters, ...methods }] of Object.entries(api.paths))
    for (const [method, operation] of Object.entries(methods))
      addOperation(api, path, method, operation);
}

function failList() {
  main.textContent = "openapi.json could not be loaded.";
}

const timer = setTimeout(() => showList().catch(failList), PATIENCE);
const show = location.pathname.endsWith("/redoc") ? showRedoc : showSwagger;
show()
  .catch(() => showList().catch(failList))
  .finally(() => clearTimeout(timer));
