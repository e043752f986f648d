// What one sees of a page that pocket/page.py writes. The model runs in a Web Worker: we send it
// requests, and it answers. The messages are at the end of page_engine.js.
'use strict'

const $ = id => document.getElementById(id)
const make = (tag, text, properties) =>  // text, never HTML
  Object.assign(document.createElement(tag), {textContent: text, ...properties})

const SETTINGS = {  // as typed; empty: off
  temperature: {value: '0.8', hint: '0: always the most probable token'},
  top_k: {value: '200', hint: 'keep the k most probable tokens'},
  top_p: {value: '', hint: 'keep the first that reach this probability'},
  min_p: {value: '', hint: 'drop those less probable than this part of the first'},
  repetition_penalty: {value: '1', hint: 'above 1: say less again'},
  max_new_tokens: {value: '500', hint: 'tokens at a time'},
  seed: {value: '1', hint: 'the same seed, the same text'},
  stop: {value: '', hint: 'text before which to stop'},
}
const RANGES = {  // least, most
  temperature: [0, 100], top_k: [1, 1e9], top_p: [0, 1], min_p: [0, 1],
  repetition_penalty: [0.01, 100], max_new_tokens: [1, 1e6], seed: [0, 2 ** 32 - 1],
}
const WHOLE = ['top_k', 'max_new_tokens', 'seed']
const MAP_SIZE = 64  // tokens in the picture of attention
const SHOWN = 200  // tokens in a list

let model  // what the payload's header says
let vocabulary  // the bytes of each token
let turns = []  // of a conversation: [[speaker, text], …]
let tail = []  // ids that the model has generated since, or that were chosen from the list
let generating = false
let ended = false  // the reply is complete: the model drew the token that says so
let number = 0  // of generations so far: each has a seed of its own
let seen = null  // the newest answer to a look
let chosen = -1  // index of the token whose attention is shown
let kept = 0  // how long the tail was before the newest generation: what to try again from
let discarded = null  // what there was before New, which can be undone

// ---- The worker

const blob = new Blob([$('engine').textContent], {type: 'text/javascript'})
const worker = new Worker(URL.createObjectURL(blob))
worker.onmessage = ({data}) => answers[data.type](data)
worker.onerror = event => showProblem(`The model stopped: ${event.message}`)
worker.postMessage({type: 'load', payload: $('payload').textContent})

const answers = {
  ready({header, tokens}) {
    model = header
    vocabulary = tokens
    start()
  },

  tokens({ids, unknown, count, seconds}) {
    tail.push(...ids)
    showUnknown(unknown)
    if (count > 1) $('status').textContent = `${Math.round(count / seconds)} tokens/s`
    showText()
  },

  done({reason}) {
    generating = false
    const {stop} = readSettings()
    if (reason === 'stop') while (decode(tail).includes(stop)) tail.pop()
    ended = reason === 'end'
    if (ended) tail.pop()  // the token that says so is not text
    if (reason === 'stopped') $('status').textContent = 'stopped'
    showText()
    look()
  },

  look(answer) {
    if (answer.number !== looks) return  // there is a newer one to come
    seen = answer
    chosen = seen.tokens.length - 1
    showUnknown(seen.unknown)
    showInside()
  },

  error({message}) {
    generating = false
    showProblem(message)
    showText()
  },
}

// ---- What the model reads: the text as typed, then the tail

const isChat = () => model.template !== null
const prompt = draft =>
  isChat() ? {turns: withDraft(draft)} : {text: $('text').value.slice(0, typed)}

// The turns with the reply that the tail is, if another turn follows it
function withDraft(draft) {
  if (!draft) return turns
  const reply = decode(tail).trim()
  const replied = reply ? [[model.template.me, reply]] : []
  return [...turns, ...replied, [model.template.you, draft]]
}

let typed = 0  // how many characters of a document were typed; those of the tail come after them

function decode(ids) {
  const bytes = Uint8Array.from(ids.map(id => vocabulary[id] ?? '').join(''), c => c.charCodeAt(0))
  return new TextDecoder('utf-8', {ignoreBOM: true}).decode(bytes)
}

const draft = () => isChat() ? $('text').value.trim() : ''

// Make the draft a turn, which the tail then replies to
function commitDraft() {
  const text = draft()
  if (!text) return
  turns = withDraft(text)
  tail = []
  kept = 0
  $('text').value = ''
}

// ---- Requests

let looks = 0  // number of the newest request to look
let timer

function look() {
  clearTimeout(timer)
  looks++
  const settings = readSettings()
  if (generating || !settings) return
  const text = draft()
  worker.postMessage({type: 'look', number: looks, prompt: prompt(text), settings,
    tail: text ? [] : tail, layer: $('layer').selectedIndex, head: $('head').selectedIndex})
}

// Once nothing was typed for a moment; answers that are still to come are about an older text
function lookSoon() {
  looks++
  clearTimeout(timer)
  timer = setTimeout(look, 80)
}

// Whether there is something to reply to or, in a document, to continue
const canGenerate = () => !isChat() || draft() || turns.length && !ended

function generate() {
  const settings = readSettings()
  if (generating || !settings || !canGenerate()) return
  commitDraft()
  kept = tail.length
  ended = false
  generating = true
  settings.seed += number++
  discarded = null
  worker.postMessage({type: 'generate', prompt: prompt(''), tail, settings})
  showProblem('')
  showText()
}

function tryAgain() {
  tail.length = kept
  ended = false
  generate()
}

// Take a token from the list of probable ones
function take({id, ends}) {
  if (generating) return
  commitDraft()
  ended = ends
  if (!ends) tail.push(id)
  showText()
  look()
}

// ---- Settings

function readSettings() {
  const settings = {}
  for (const name of Object.keys(SETTINGS)) {
    const text = $(name).value
    if (name === 'stop') settings.stop = text.replaceAll('\\n', '\n')
    else if (!text.trim()) settings[name] = null
    else settings[name] = Number(text)
  }
  for (const [name, [least, most]] of Object.entries(RANGES)) {
    const value = settings[name]
    const isNeeded = ['temperature', 'max_new_tokens', 'seed'].includes(name)
    const isWhole = !WHOLE.includes(name) || Number.isInteger(value)
    const isGood = value === null ? !isNeeded : value >= least && value <= most && isWhole
    $(name).ariaInvalid = !isGood
    if (!isGood) {
      const kind = WHOLE.includes(name) ? 'a whole number' : 'a number'
      const got = value === null ? 'nothing' : $(name).value
      showProblem(`${name} must be ${kind} from ${least} to ${most}, not ${got}`)
      return null
    }
  }
  return settings
}

function makeSettings() {
  for (const [name, setting] of Object.entries(SETTINGS)) {
    const label = make('label', name)
    const value = model.settings[name] ?? setting.value
    const mode = name === 'stop' ? 'text' : 'decimal'
    label.append(make('input', '', {id: name, value, inputMode: mode, autocomplete: 'off',
      spellcheck: false, oninput: () => {
        showProblem('')
        lookSoon()
      }}), make('small', setting.hint))
    $('fields').append(label)
  }
}

// ---- Display: the text

function showText() {
  if (isChat()) showConversation()
  else showDocument()
  $('send').hidden = generating
  $('stop').hidden = !generating
  $('again').hidden = generating || tail.length <= kept
  $('new').hidden = generating || isEmpty()
  $('undo').hidden = !discarded
  $('examples').hidden = generating || !isEmpty() && (isChat() || $('text').value !== model.start)
  $('send').disabled = !canGenerate()
  $('send').textContent = isChat() && (draft() || !turns.length || ended) ? 'Send' : 'Continue'
}

// Whether there is no text at all
const isEmpty = () => !(tail.length || turns.length || $('text').value)

function showConversation() {
  const reply = decode(tail).trimStart()
  const shown = [...turns]
  if (reply || generating) shown.push([model.template.me, reply || '…'])
  $('log').replaceChildren(...shown.map(([speaker, text]) => {
    const isMine = speaker === model.template.you
    const turn = make('li', '', {className: isMine ? 'mine' : ''})
    turn.append(make('b', speaker), make('span', text))
    return turn
  }))
  $('log').ariaBusy = generating  // a screen reader waits until the reply is complete
  $('hello').hidden = shown.length > 0
  if (generating) $('buttons').scrollIntoView({block: 'nearest'})
}

function showDocument() {
  const box = $('text')
  const atBottom = box.scrollHeight - box.scrollTop - box.clientHeight < 60
  box.value = box.value.slice(0, typed) + decode(tail)
  box.readOnly = generating
  if (atBottom && generating) box.scrollTop = box.scrollHeight
}

function showProblem(text) {
  $('problem').textContent = text
}

function showUnknown(characters) {
  const unseen = `Left out, because the model has never seen it: ${characters.join(' ')}`
  showProblem(characters.length ? unseen : '')
}

// ---- Display: inside the model

// White space made visible
const visible = text =>
  text.replaceAll(' ', '␣').replaceAll('\n', '↵').replaceAll('\t', '⇥') || '∅'

// The names that a screen reader says
const spoken = text => ({' ': 'space', '\n': 'line break', '': 'nothing'})[text] ?? text

function percent(share) {
  if (share > 0 && share < 0.0005) return '< 0.1 %'
  return `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`
}

function showInside() {
  const {tokens, next, total} = seen
  const limit = total > tokens.length ? `; it sees the last ${tokens.length}` : ''
  $('tokens-hint').textContent =
    `The model reads pieces of text, each of which has a number: ${total} so far${limit}.`
  showTokens($('tokens'), (button, {id}) => {
    button.append(make('small', id))
    button.style.setProperty('--hue', Math.round(id * 137.5) % 360)
    return `id ${id}`
  })

  $('next').replaceChildren(...next.map(token => {
    const button = make('button', '', {onclick: () => take(token), ariaLabel:
      `Take ${spoken(token.text)}, ${percent(token.probability)}`})
    const largest = next[0].probability
    button.style.setProperty('--share', `${100 * token.probability / largest}%`)
    button.append(make('span', visible(token.text)), make('span', percent(token.probability)))
    const item = make('li')
    item.append(button)
    return item
  }))
  showAttention()
}

// The last tokens as buttons, with arrow keys to walk between them. decorate(button, token, index)
// adds what else there is to see, and returns what a screen reader says of it
function showTokens(box, decorate) {
  const {tokens} = seen
  const first = Math.max(0, tokens.length - SHOWN)
  const buttons = tokens.slice(first).map((token, i) => {
    const index = first + i
    const button = make('button', visible(token.text), {onclick: () => choose(index)})
    button.ariaLabel = `${spoken(token.text)}, ${decorate(button, token, index)}`
    button.ariaPressed = index === chosen
    button.tabIndex = index === chosen ? 0 : -1
    return button
  })
  box.replaceChildren(...buttons)
  box.scrollTop = box.scrollHeight
  box.onkeydown = event => {
    const step = {ArrowLeft: -1, ArrowRight: 1}[event.key]
    const button = buttons[buttons.indexOf(document.activeElement) + step]
    if (!button) return
    event.preventDefault()
    button.click()
    box.querySelector('[aria-pressed=true]').focus()
  }
}

function choose(index) {
  const scrolled = [$('tokens').scrollTop, $('looks').scrollTop]
  chosen = index
  showInside()
  ;[$('tokens').scrollTop, $('looks').scrollTop] = scrolled
}

function showAttention() {
  const weights = seen.attention[chosen] ?? []
  const largest = Math.max(...weights)
  showTokens($('looks'), (button, token, index) => {
    const share = weights[index] ?? 0  // later tokens are not looked at
    button.style.setProperty('--share', `${100 * share / largest}%`)
    button.className = share > largest / 2 ? 'strong' : ''
    return percent(share)
  })

  const order = [...weights.keys()].sort((a, b) => weights[b] - weights[a]).slice(0, 3)
  const described = order.map(index => {
    const there = `“${visible(seen.tokens[index].text)}” ${chosen - index} back`
    return `${index === chosen ? 'itself' : there} (${percent(weights[index])})`
  })
  const token = seen.tokens[chosen]
  const sentence = token && `“${visible(token.text)}” looks most at ${described.join(', ')}.`
  $('summary').textContent = sentence ?? ''
  drawMap()
}

function drawMap() {
  const canvas = $('map')
  const first = Math.max(0, seen.attention.length - MAP_SIZE)
  const rows = seen.attention.slice(first)
  const cell = 8  // pixels
  canvas.width = canvas.height = cell * Math.max(1, rows.length)
  const context = canvas.getContext('2d')
  const style = getComputedStyle(document.documentElement)
  context.fillStyle = style.getPropertyValue('--accent')
  rows.forEach((weights, y) => {
    const largest = Math.max(...weights)
    weights.slice(first).forEach((weight, x) => {
      context.globalAlpha = Math.sqrt(weight / largest)
      context.fillRect(x * cell, y * cell, cell, cell)
    })
  })
  context.globalAlpha = 1
  context.strokeStyle = style.getPropertyValue('--ink')
  if (chosen >= first) context.strokeRect(0, (chosen - first) * cell + 0.5, canvas.width, cell - 1)
  canvas.ariaLabel = `Attention map of layer ${$('layer').value}, head ${$('head').value}. ` +
    $('summary').textContent
  canvas.onclick = event => {
    const row = Math.floor(event.offsetY / canvas.clientHeight * rows.length)
    choose(first + Math.min(row, rows.length - 1))
  }
}

// ---- Events

$('text').oninput = () => {
  if (!isChat()) {  // what was generated is now text like any other
    tail = []
    kept = 0
    typed = $('text').value.length
  }
  showText()
  lookSoon()
}
$('text').onkeydown = event => {
  if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
    event.preventDefault()
    generate()
  }
}
onkeydown = event => {
  if (event.key === 'Escape') $('stop').click()
}
$('send').onclick = generate
$('again').onclick = tryAgain
$('stop').onclick = () => worker.postMessage({type: 'stop'})
$('new').onclick = () => {
  discarded = {turns, tail, kept, ended, typed, text: $('text').value}
  turns = []
  tail = []
  kept = 0
  ended = false
  typed = 0
  $('text').value = ''
  $('status').textContent = ''
  showText()
  look()
  $('text').focus()
}
$('undo').onclick = () => {
  ;({turns, tail, kept, ended, typed} = discarded)
  $('text').value = discarded.text
  discarded = null
  showText()
  look()
  $('text').focus()
}
$('layer').onchange = look
$('head').onchange = look
matchMedia('(prefers-color-scheme: dark)').onchange = () => seen && drawMap()

function tryExample(example) {
  $('text').value = example
  typed = example.length
  tail = []
  generate()
}

// ---- Start, once the model is ready

// The address of the repository whose GitHub Pages this page is one of, or nothing
function repository() {
  const owner = location.hostname.match(/^([^.]+)\.github\.io$/)
  const name = location.pathname.split('/')[1]
  if (owner && name) return `https://github.com/${owner[1]}/${name}`
}

function start() {
  const {config, num_params, weights, links} = model
  $('about').textContent = `${(num_params / 1e6).toFixed(1)} M parameters in ${weights}, in this ` +
    'page: no server, no network. It makes things up.'
  for (const [text, address] of links) {
    const href = address === 'github:' ? repository() : address
    if (href) $('links').append(make('a', text, {href}))
  }
  for (const [id, count] of [['layer', config.n_layer], ['head', config.n_head]]) {
    $(id).append(...Array.from({length: count}, (_, i) => make('option', i + 1)))
  }
  $('layer').selectedIndex = Math.floor(config.n_layer / 2)

  $('write').className = isChat() ? '' : 'document'
  $('hello').textContent = model.about || (isChat() ?
    'It replies in the style of its training data.' :
    'Write the beginning of a text. Enter: the model continues it. Shift+Enter: a new line.')
  $('examples').append(...model.examples.map(example =>
    make('button', example.trim(), {onclick: () => tryExample(example)})))
  $('text').placeholder = isChat() ? `Say something to ${model.template.me}` : ''
  $('text').value = isChat() ? '' : model.start
  typed = $('text').value.length
  $('text').disabled = false
  $('status').textContent = 'ready'
  makeSettings()
  showText()
  look()
  if (innerWidth > 900) $('text').focus()  // not on a phone, where a keyboard would jump up
}
