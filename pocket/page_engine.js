// The model of a page that pocket/page.py writes: tokenizer, Transformer, sampling. It runs in a
// Web Worker of the browser, so that the page never freezes, or in node, for the tests.
// Read it like model.py, whose names it uses; only the letters N (tokens read at a time) and t (the
// position of a token in the text) are new.
'use strict'

// ---- The payload: one block of bytes with everything the page knows

// bytes: gzip of 4 bytes (length of the JSON), the JSON, the tensors. See pack() in pocket/page.py.
// Returns the JSON, which says where each tensor lies, and the block of bytes, decompressed
async function unpack(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('gzip'))
  const buffer = await new Response(stream).arrayBuffer()
  const length = new DataView(buffer).getUint32(0, true)
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)))
  return {header, buffer}
}

function decodeBase64(text) {
  const characters = atob(text)
  const bytes = new Uint8Array(characters.length)
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i)
  return bytes
}

// ---- Text to ids and back

// A byte string is a JavaScript string whose characters are the bytes 0 to 255 of UTF-8
function toByteString(text) {
  let result = ''
  for (const byte of new TextEncoder().encode(text)) result += String.fromCharCode(byte)
  return result
}

const toBytes = byteString => Uint8Array.from(byteString, c => c.charCodeAt(0))

class Tokenizer {
  // kind: char, byte or bpe. tokens: a byte string per id. split: a regular expression, for bpe
  constructor({kind, tokens, split, special_tokens, eos_ids, decoder_start_id}) {
    this.kind = kind
    this.tokens = tokens
    this.specialTokens = special_tokens
    this.eosIds = eos_ids
    this.decoderStartId = decoder_start_id
    this.split = split === null ? null : RegExp(split, 'gu')
    this.ids = new Map()
    tokens.forEach((token, id) => token && this.ids.set(token, id))
  }

  encode(text) {
    if (this.kind === 'bpe') return (text.match(this.split) ?? []).flatMap(
      word => this.encodeWord(toByteString(word)))
    const pieces = this.kind === 'char' ? [...text].map(toByteString) : [...toByteString(text)]
    return pieces.map(piece => {
      if (!this.ids.has(piece)) throw Error(`the model does not know ${JSON.stringify(text)}`)
      return this.ids.get(piece)
    })
  }

  // Byte-pair encoding: join the two neighbors whose merge was learned first, until none can be
  encodeWord(word) {
    if (this.ids.has(word)) return [this.ids.get(word)]
    const parts = [...word]
    while (true) {
      let best = -1
      let bestRank = Infinity
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ids.get(parts[i] + parts[i + 1]) ?? Infinity
        if (rank < bestRank) {
          best = i
          bestRank = rank
        }
      }
      if (best < 0) return parts.map(part => this.ids.get(part))
      parts.splice(best, 2, parts[best] + parts[best + 1])
    }
  }

  // The characters of a text that the tokenizer does not know, each once
  unknown(text) {
    if (this.kind !== 'char') return []
    return [...new Set(text)].filter(c => !this.ids.has(toByteString(c)))
  }

  // The ids to generate from, which are never empty
  encodePrompt(text) {
    if (!text && this.unknown('\n').length === 0) text = '\n'
    const ids = this.encode(text)
    return ids.length ? ids : [0]
  }

  decode(ids) {
    const bytes = toBytes(ids.map(id => this.tokens[id] ?? '').join(''))
    return new TextDecoder('utf-8', {ignoreBOM: true}).decode(bytes)
  }

  // A function that decodes one id at a time, and holds back bytes of incomplete characters
  streamDecoder() {
    const decoder = new TextDecoder('utf-8', {ignoreBOM: true})
    return id => id === null ? decoder.decode() :
      decoder.decode(toBytes(this.tokens[id] ?? ''), {stream: true})
  }

  // One token as text to look at: special tokens by name, halves of characters as hexadecimal
  show(id) {
    for (const [name, special] of Object.entries(this.specialTokens))
      if (special === id) return `<${name}>`
    const token = this.tokens[id] ?? ''
    try {
      return new TextDecoder('utf-8', {fatal: true, ignoreBOM: true}).decode(toBytes(token))
    } catch {
      return Array.from(token, c => '\\x' + c.charCodeAt(0).toString(16).padStart(2, '0')).join('')
    }
  }
}

// ---- Conversations to ids: pocket/template.py explains each of these

function encodePiece(tok, piece) {
  const name = piece.startsWith('<') && piece.endsWith('>') ? piece.slice(1, -1) : ''
  return Object.hasOwn(tok.specialTokens, name) ? [tok.specialTokens[name]] : tok.encode(piece)
}

function formatTurn(template, speaker, text) {
  return template.turn.replace(/\{speaker\}|\{text\}/g, m => m === '{text}' ? text : speaker)
}

// turns: [[speaker, text], …], the newest last. Only as many whole turns as fit are kept
function encodeConversation(tok, template, turns, maxTokens) {
  const bos = encodePiece(tok, template.begin)
  const recent = turns.slice(-template.turns)
  let ids = []
  for (let i = recent.length - 1; i >= 0; i--) {
    let turn = tok.encode(formatTurn(template, ...recent[i]))
    if (i < recent.length - 1) turn = [...turn, ...encodePiece(tok, template.between)]
    if (bos.length + turn.length + ids.length > maxTokens) {
      if (!ids.length) ids = turn.slice(-Math.max(1, maxTokens - bos.length))
      break
    }
    ids = [...turn, ...ids]
  }
  return [...bos, ...ids]
}

// Ids of a conversation, ready for the model's reply
function encodeChatPrompt(tok, template, turns, blockSize, maxNewTokens) {
  const start = [tok.decoderStartId, ...tok.encode(template.reply)]
  const reply = Math.min(maxNewTokens, Math.floor(blockSize / 2))
  const room = Math.max(1, blockSize - start.length - reply)
  return [...encodeConversation(tok, template, turns, room).slice(-room), ...start]
}

// ---- The kernels, in which most of the time is spent: matrix times vector

// A kernel(x, w, y, rows, cols, skip) computes the sums y[o] = w[o, 0] x[0] + w[o, 1] x[1] + …
// x, w and y say where these lie in memory, in bytes; x and y are float32, w is int8 or float32.
// cols is a multiple of 16. skip: bytes between the end of a row of w and the start of the next
function plainKernels(buffer) {
  const floats = new Float32Array(buffer)
  const kernel = (weights, size) => (x, w, y, rows, cols, skip) => {
    for (let o = 0; o < rows; o++) {
      const from = (w + o * (cols * size + skip)) / size
      let sum = 0
      for (let i = 0; i < cols; i++) sum += weights[from + i] * floats[x / 4 + i]
      floats[y / 4 + o] = sum
    }
  }
  return {int8: kernel(new Int8Array(buffer), 1), float32: kernel(floats, 4)}
}

// The same sums in WebAssembly, whose SIMD instructions compute four products at once: about eight
// times as fast. There is no compiler: the instructions are written down here, one after the other.
// Their numbers are in the specification, https://webassembly.github.io/spec/core/binary
const get = local => [0x20, local]
const set = local => [0x21, local]
const i32 = number => [0x41, ...leb(number, true)]
const loadVector = offset => [0xFD, 0x00, 0, ...leb(offset)]
const simd = code => [0xFD, ...leb(code)]
const loop = (...code) => [0x03, 0x40, ...code.flat(), 0x0B]
const REPEAT_IF = [0x0D, 0]
const ADD = [0x6A], SUBTRACT = [0x6B], MULTIPLY = [0x6C], NOT_EQUAL = [0x47]
const ADD_FLOAT = [0x92], STORE_FLOAT = [0x38, 2, 0]
const ADD_VECTORS = simd(0xE4), MULTIPLY_VECTORS = simd(0xE6)
const WIDEN_8 = [simd(0x87), simd(0x88)]  // the lower, the upper half of 16 int8 to int16
const WIDEN_16 = [simd(0xA7), simd(0xA8)]  // … of 8 int16 to int32
const TO_FLOATS = simd(0xFA)
const laneOf = lane => [0xFD, 0x1F, lane]
const ZERO_VECTOR = [...simd(12), ...Array(16).fill(0)]

// Numbers are written in groups of 7 bits, the lowest first (LEB128)
function leb(number, signed = false) {
  const bytes = []
  while (number >= (signed ? 64 : 128)) {
    bytes.push(number & 127 | 128)
    number >>= 7
  }
  return [...bytes, number]
}

function kernelCode(type) {
  const [x, w, y, rows, cols, skip, position, end, raw] = [0, 1, 2, 3, 4, 5, 6, 7, 8]
  const sums = [9, 10, 11, 12]  // four vectors, because each addition waits for the one before
  const step = type === 'int8' ? 16 : 64  // bytes of 16 weights

  // Four weights as a vector of float32
  const weights = quarter => type === 'float32' ? [...get(w), ...loadVector(16 * quarter)] :
    [...get(raw), ...WIDEN_8[quarter >> 1], ...WIDEN_16[quarter & 1], ...TO_FLOATS]
  const addProducts = (sum, quarter) => [
    ...weights(quarter), ...get(position), ...loadVector(16 * quarter), ...MULTIPLY_VECTORS,
    ...get(sum), ...ADD_VECTORS, ...set(sum)]
  const advance = (local, amount) => [...get(local), ...amount, ...ADD, ...set(local)]

  const total = sums.flatMap((sum, i) => i ? [...get(sum), ...ADD_VECTORS] : get(sum))
  const lanes = [0, 1, 2, 3].flatMap(lane =>
    [...get(raw), ...laneOf(lane), ...(lane ? ADD_FLOAT : [])])
  return loop(
    get(x), set(position),
    get(x), get(cols), i32(4), MULTIPLY, ADD, set(end),
    ...sums.map(sum => [...ZERO_VECTOR, ...set(sum)]),
    loop(
      type === 'int8' ? [...get(w), ...loadVector(0), ...set(raw)] : [],
      ...sums.map(addProducts),
      advance(w, i32(step)),
      advance(position, i32(64)),
      get(position), get(end), NOT_EQUAL, REPEAT_IF),
    total, set(raw),
    get(y), lanes, STORE_FLOAT,
    advance(y, i32(4)),
    advance(w, get(skip)),
    get(rows), i32(1), SUBTRACT, set(rows),
    get(rows), REPEAT_IF)
}

// A module is a row of sections; a section is its number, its length in bytes and its content
function kernelModule() {
  const text = string => [string.length, ...new TextEncoder().encode(string)]
  const section = (number, content) => [number, ...leb(content.length), ...content]
  const body = type => {
    const locals = [2, 2, 0x7F, 5, 0x7B]  // two groups: 2 × i32, 5 × v128
    const code = [...locals, ...kernelCode(type), 0x0B]
    return [...leb(code.length), ...code]
  }
  return Uint8Array.from([
    0, 0x61, 0x73, 0x6D, 1, 0, 0, 0,  // "\0asm", version 1
    ...section(1, [1, 0x60, 6, ...Array(6).fill(0x7F), 0]),  // type 0: six i32, no result
    ...section(2, [1, ...text('page'), ...text('memory'), 2, 0, 1]),  // our memory, ≥ 1 page
    ...section(3, [2, 0, 0]),  // two functions of type 0
    ...section(7, [2, ...text('int8'), 0, 0, ...text('float32'), 0, 1]),  // their names
    ...section(10, [2, ...body('int8'), ...body('float32')]),
  ])
}

function makeKernels(memory) {
  const bytes = kernelModule()
  if (!WebAssembly.validate(bytes)) return plainKernels(memory.buffer)  // a browser without SIMD
  const module = new WebAssembly.Module(bytes)
  return new WebAssembly.Instance(module, {page: {memory}}).exports
}

const roundUp = number => Math.ceil(number / 16) * 16

// ---- Arithmetic on N rows of numbers, which lie one after the other in a Float32Array

// Normalize x[from … from + size] in place
function layerNorm(x, from, size, eps, weight, bias) {
  let mean = 0
  for (let i = 0; i < size; i++) mean += x[from + i]
  mean /= size
  let variance = 0
  for (let i = 0; i < size; i++) variance += (x[from + i] - mean) ** 2
  const factor = 1 / Math.sqrt(variance / size + eps)
  for (let i = 0; i < size; i++) {
    let value = (x[from + i] - mean) * factor
    if (weight) value *= weight[i]
    if (bias) value += bias[i]
    x[from + i] = value
  }
}

function rmsNorm(x, from, size, eps, weight) {
  let squares = 0
  for (let i = 0; i < size; i++) squares += x[from + i] ** 2
  const factor = 1 / Math.sqrt(squares / size + eps)
  for (let i = 0; i < size; i++) x[from + i] *= factor * weight[i]
}

// The logits of a row as probabilities, in place
function softmax(x) {
  let max = -Infinity
  for (const value of x) if (value > max) max = value
  let sum = 0
  for (let i = 0; i < x.length; i++) {
    x[i] = Math.exp(x[i] - max)
    sum += x[i]
  }
  for (let i = 0; i < x.length; i++) x[i] /= sum
  return x
}

// The error function, to 1.2e-7: Numerical Recipes, section 6.2
function erf(x) {
  const t = 1 / (1 + 0.5 * Math.abs(x))
  const factors = [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806,
    0.09678418, 0.37409196, 1.00002368, -1.26551223]
  const polynomial = factors.reduce((sum, factor) => sum * t + factor, 0)
  const result = 1 - t * Math.exp(-x * x + polynomial)
  return x >= 0 ? result : -result
}

const ACTIVATIONS = {
  gelu: x => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu_erf: x => 0.5 * x * (1 + erf(x / Math.SQRT2)),
  relu: x => Math.max(0, x),
  relu2: x => Math.max(0, x) ** 2,
  swiglu: x => x / (1 + Math.exp(-x)),  // of the gate
}

// Angles t * theta^(-2i / size) of a position, in float32 like model.py
function positionAngles(t, size, theta, scaling) {
  const angles = new Float64Array(Math.ceil(size / 2))
  for (let i = 0; i < angles.length; i++) {
    let frequency = theta ** (-2 * i / size)
    if (scaling) frequency = scaleFrequency(frequency, scaling)
    angles[i] = Math.fround(t * Math.fround(frequency))
  }
  return angles
}

function scaleFrequency(frequency, scaling) {
  const slowed = frequency / scaling.factor
  if (scaling.rope_type === 'linear') return slowed
  const turns = scaling.original_max_position_embeddings * frequency / (2 * Math.PI)
  const {low_freq_factor: low, high_freq_factor: high} = scaling
  const keep = Math.min(1, Math.max(0, (turns - low) / (high - low)))
  return (1 - keep) * slowed + keep * frequency
}

// ---- The Transformer

const CHUNK = 16  // tokens read at a time

class Model {
  // header: see unpack(), whose buffer is copied
  constructor({header, buffer}) {
    const config = header.config
    this.config = config
    this.headDim = config.head_dim ?? config.n_embd / config.n_head
    this.kvHeads = config.n_kv_head ?? config.n_head
    this.qWidth = config.n_head * this.headDim
    this.kvWidth = this.kvHeads * this.headDim
    this.tensors = Object.fromEntries(header.tensors.map(tensor => [tensor.name, tensor]))
    this.makeMemory(buffer)

    // What was computed for the tokens read so far. Attention needs their keys and values, token
    // shift the inputs of the token before, and the page the queries: with them it shows later who
    // looked at whom
    this.ids = []
    const cache = width => Array.from({length: config.n_layer},
      () => new Float32Array(config.block_size * width))
    this.q = cache(this.qWidth)
    if (config.token_shift) {
      const half = config.n_embd / 2
      this.shift = {attn: cache(half), mlp: cache(half)}
    }
    if (config.pos === 'rotary') {
      const {rope_theta, rope_scaling} = config
      this.rope = Array.from({length: config.block_size}, (_, t) => {
        const angles = positionAngles(t, this.headDim, rope_theta, rope_scaling)
        return {cos: angles.map(Math.cos), sin: angles.map(Math.sin)}
      })
    }
  }

  // What the kernels read and write lies in one memory: the tensors, keys and values, and an x and
  // a y for each product. k: for each layer and head a row per token. v: a row per channel, so that
  // a mean of values is a product, too
  makeMemory(buffer) {
    const {n_layer, block_size} = this.config
    this.kSize = block_size * roundUp(this.headDim)
    this.vSize = this.headDim * roundUp(block_size)
    const sizes = {
      x: roundUp(block_size),
      y: roundUp(block_size),
      k: n_layer * this.kvHeads * this.kSize,
      v: n_layer * this.kvHeads * this.vSize,
    }
    for (const {shape} of Object.values(this.tensors)) {
      if (shape.length === 2) {
        sizes.x = Math.max(sizes.x, roundUp(shape[1]))
        sizes.y = Math.max(sizes.y, roundUp(shape[0]))
      }
    }
    let bytes = roundUp(buffer.byteLength)
    for (const [name, size] of Object.entries(sizes)) {
      this[name] = bytes
      bytes += 4 * size
    }

    const memory = new WebAssembly.Memory({initial: Math.ceil(bytes / 65536)})
    new Uint8Array(memory.buffer).set(new Uint8Array(buffer))
    this.floats = new Float32Array(memory.buffer)
    this.int8s = new Int8Array(memory.buffer)
    this.kernels = makeKernels(memory)
  }

  // A tensor of one dimension, or nothing
  vector(name) {
    const tensor = this.tensors[name]
    return tensor && this.floats.subarray(tensor.offset / 4, tensor.offset / 4 + tensor.shape[0])
  }

  // Row `index` of a matrix, as numbers
  rowOf(name, index) {
    const {shape: [, cols], type, offset, scales} = this.tensors[name]
    const from = index * roundUp(cols)
    if (type === 'float32') return this.floats.slice(offset / 4 + from, offset / 4 + from + cols)
    const scale = this.floats[scales / 4 + index]
    const row = this.int8s.subarray(offset + from, offset + from + cols)
    return Float32Array.from(row, value => value * scale)
  }

  // x Wᵀ + bias, where x has N rows. A weight in int8 is times the scale of its row of W
  linear(x, N, name) {
    const {shape: [rows, cols], type, offset, scales} = this.tensors[`${name}.weight`]
    const bias = this.vector(`${name}.bias`)
    const scale = type === 'int8' && this.floats.subarray(scales / 4, scales / 4 + rows)
    const result = this.floats.subarray(this.y / 4, this.y / 4 + rows)
    const y = new Float32Array(N * rows)
    for (let n = 0; n < N; n++) {
      this.setX(x.subarray(n * cols, (n + 1) * cols))
      this.kernels[type](this.x, offset, this.y, rows, roundUp(cols), 0)
      if (scale) for (let o = 0; o < rows; o++) result[o] *= scale[o]
      if (bias) for (let o = 0; o < rows; o++) result[o] += bias[o]
      y.set(result, n * rows)
    }
    return y
  }

  // Put a vector where the kernels read x, with zeros up to a multiple of 16
  setX(vector) {
    this.floats.set(vector, this.x / 4)
    this.floats.fill(0, this.x / 4 + vector.length, this.x / 4 + roundUp(vector.length))
  }

  norm(x, N, name) {
    const {n_embd: C, norm, norm_eps: eps} = this.config
    const weight = this.vector(`${name}.weight`)
    const bias = this.vector(`${name}.bias`)
    const y = x.slice()
    for (let n = 0; n < N; n++) {
      if (norm === 'rmsnorm') rmsNorm(y, n * C, C, eps, weight)
      else layerNorm(y, n * C, C, eps, weight, bias)
    }
    return y
  }

  // Read ids, of which the cache may hold the first ones already. Returns the logits of the token
  // that follows
  logits(ids) {
    let known = 0
    while (known < this.ids.length && known < ids.length - 1 && this.ids[known] === ids[known]) {
      known++
    }
    this.ids.length = known

    let x
    while (this.ids.length < ids.length) {
      const unread = ids.slice(this.ids.length, this.ids.length + CHUNK)
      x = this.readChunk(unread)
    }
    x = x.slice(-this.config.n_embd)  // the last token's
    if (this.config.norm_position === 'pre') x = this.norm(x, 1, 'transformer.ln_f')
    return this.head(x)
  }

  head(x) {
    const {softcap} = this.config
    const logits = this.linear(x, 1, 'lm_head')
    return softcap ? logits.map(value => softcap * Math.tanh(value / softcap)) : logits
  }

  // Read N more tokens: returns (N, C), the residual stream after the last block
  readChunk(ids) {
    const N = ids.length
    const start = this.ids.length
    let x = this.embed(ids, start)
    for (let layer = 0; layer < this.config.n_layer; layer++) x = this.block(x, N, start, layer)
    this.ids.push(...ids)
    return x
  }

  embed(ids, start) {
    const {n_embd: C, pos} = this.config
    const x = new Float32Array(ids.length * C)
    ids.forEach((id, n) => {
      let row = this.rowOf('transformer.wte.weight', id)
      if (pos === 'learned') {
        const position = this.rowOf('transformer.wpe.weight', start + n)
        row = row.map((value, i) => value + position[i])
      }
      if (pos === 'sinusoidal') {
        const angles = positionAngles(start + n, C, 10000, null)
        const waves = [...angles.map(Math.sin), ...angles.map(Math.cos)]
        row = row.map((value, i) => value * Math.sqrt(C) + waves[i])
      }
      x.set(row, n * C)
    })
    return x
  }

  block(x, N, start, layer) {
    const name = `transformer.h.${layer}`
    const add = y => x.map((value, i) => value + y[i])
    if (this.config.norm_position === 'post') {
      x = this.norm(add(this.attention(x, N, start, layer)), N, `${name}.ln_1`)
      x = this.norm(add(this.mlp(x, N, start, layer)), N, `${name}.ln_2`)
      return x
    }
    x = add(this.attention(this.norm(x, N, `${name}.ln_1`), N, start, layer))
    x = add(this.mlp(this.norm(x, N, `${name}.ln_2`), N, start, layer))
    return x
  }

  // Token shift: the first half of each token's channels comes from the token before it
  shiftTokens(x, N, start, cache) {
    const C = this.config.n_embd
    const half = C / 2
    const y = x.slice()
    for (let n = 0; n < N; n++) cache.set(x.subarray(n * C, n * C + half), (start + n) * half)
    for (let n = 0; n < N; n++) {
      const t = start + n
      const before = t ? cache.subarray((t - 1) * half, t * half) : new Float32Array(half)
      y.set(before, n * C)
    }
    return y
  }

  attention(x, N, start, layer) {
    const name = `transformer.h.${layer}.attn`
    if (this.shift) x = this.shiftTokens(x, N, start, this.shift.attn[layer])
    const qkv = this.linear(x, N, `${name}.c_attn`)
    const width = this.qWidth + 2 * this.kvWidth
    const {n_head: H} = this.config
    const D = this.headDim

    // Queries and keys of all heads lie next to each other: normalize and rotate them, then keep
    // them for the tokens to come
    for (let n = 0; n < N; n++) {
      const t = start + n
      for (let head = 0; head < H + this.kvHeads; head++) {
        const from = n * width + head * D
        if (this.config.qk_norm) this.normalizeHead(qkv, from, name, head < H)
        if (this.rope) this.rotate(qkv, from, this.rope[t])
      }
      const row = qkv.subarray(n * width, (n + 1) * width)
      this.q[layer].set(row.subarray(0, this.qWidth), t * this.qWidth)
      this.remember(row, layer, t)
    }

    // Each head of each token: a mean of the values, weighted by how well the keys match
    const y = new Float32Array(N * this.qWidth)
    for (let n = 0; n < N; n++) {
      for (let head = 0; head < H; head++) {
        const weights = this.attentionWeights(layer, head, start + n)
        y.set(this.meanOfValues(layer, head, weights), n * this.qWidth + head * D)
      }
    }
    return this.linear(y, N, `${name}.c_proj`)
  }

  // Keep the keys and values of the token at position t
  remember(qkv, layer, t) {
    const D = this.headDim
    for (let kv = 0; kv < this.kvHeads; kv++) {
      const from = this.qWidth + kv * D
      const key = qkv.subarray(from, from + D)
      this.floats.set(key, this.keysOf(layer, kv) / 4 + t * roundUp(D))
      const column = this.valuesOf(layer, kv) / 4 + t
      const step = roundUp(this.config.block_size)
      for (let i = 0; i < D; i++) this.floats[column + i * step] = qkv[from + this.kvWidth + i]
    }
  }

  // Where the keys, the values of a head lie
  keysOf(layer, kv) {
    return this.k + 4 * (layer * this.kvHeads + kv) * this.kSize
  }

  valuesOf(layer, kv) {
    return this.v + 4 * (layer * this.kvHeads + kv) * this.vSize
  }

  normalizeHead(x, from, name, isQuery) {
    if (this.config.qk_norm === 'rmsnorm') {
      const weight = this.vector(`${name}.${isQuery ? 'q_norm' : 'k_norm'}.weight`)
      rmsNorm(x, from, this.headDim, this.config.norm_eps, weight)
    } else {
      layerNorm(x, from, this.headDim, 1e-5)
    }
  }

  rotate(x, from, {cos, sin}) {
    const half = this.headDim / 2
    for (let i = 0; i < half; i++) {
      const a = x[from + i]
      const b = x[from + half + i]
      x[from + i] = a * cos[i] - b * sin[i]
      x[from + half + i] = a * sin[i] + b * cos[i]
    }
  }

  // How much the token at position t looks at each token up to itself: softmax(q kᵀ / √D)
  attentionWeights(layer, head, t) {
    const D = this.headDim
    const kv = Math.floor(head * this.kvHeads / this.config.n_head)  // whose keys this head shares
    const from = t * this.qWidth + head * D
    this.setX(this.q[layer].subarray(from, from + D))
    this.kernels.float32(this.x, this.keysOf(layer, kv), this.y, t + 1, roundUp(D), 0)
    const scores = this.floats.slice(this.y / 4, this.y / 4 + t + 1)
    for (let s = 0; s <= t; s++) scores[s] /= Math.sqrt(D)
    return softmax(scores)
  }

  meanOfValues(layer, head, weights) {
    const kv = Math.floor(head * this.kvHeads / this.config.n_head)
    const cols = roundUp(weights.length)
    const skip = 4 * (roundUp(this.config.block_size) - cols)
    this.setX(weights)
    this.kernels.float32(this.x, this.valuesOf(layer, kv), this.y, this.headDim, cols, skip)
    return this.floats.slice(this.y / 4, this.y / 4 + this.headDim)
  }

  mlp(x, N, start, layer) {
    const name = `transformer.h.${layer}.mlp`
    if (this.shift) x = this.shiftTokens(x, N, start, this.shift.mlp[layer])
    const hidden = this.linear(x, N, `${name}.c_fc`)
    const activate = ACTIVATIONS[this.config.act]
    if (this.config.act !== 'swiglu') {
      return this.linear(hidden.map(activate), N, `${name}.c_proj`)
    }

    // The first half of each row is a gate for the second
    const width = hidden.length / N / 2
    const gated = new Float32Array(N * width)
    for (let n = 0; n < N; n++) {
      for (let i = 0; i < width; i++) {
        const at = 2 * n * width + i
        gated[n * width + i] = activate(hidden[at]) * hidden[at + width]
      }
    }
    return this.linear(gated, N, `${name}.c_proj`)
  }
}

// ---- From logits to one token: sample_next_token() of pocket/generate.py

// Random numbers from 0 to 1, the same for the same seed: the generator mulberry32
function randomNumbers(seed) {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6D2B79F5) >>> 0
    let z = Math.imul(state ^ (state >>> 15), state | 1)
    z ^= z + Math.imul(z ^ (z >>> 7), z | 61)
    return ((z ^ (z >>> 14)) >>> 0) / 2 ** 32
  }
}

// What may come next: {ids, probabilities}, the most probable first if top_k or top_p ask for that.
// settings: temperature, top_k, top_p, min_p, repetition_penalty. banned: ids that never come
function nextTokens(logits, settings, seen, banned) {
  const {temperature, top_k, top_p, min_p, repetition_penalty} = settings
  logits = logits.slice()
  for (const id of banned) logits[id] = -Infinity
  if ((repetition_penalty ?? 1) !== 1) {
    for (const id of new Set(seen)) {
      const value = logits[id]
      logits[id] = value > 0 ? value / repetition_penalty : value * repetition_penalty
    }
  }

  // Greedy: the limit of ever lower temperatures
  if (temperature === 0) return {ids: [argmax(logits)], probabilities: [1]}

  let ids = Array.from(logits.keys())
  if (top_k || top_p) ids = mostProbable(logits, ids, top_k || logits.length)
  let probabilities = softmax(Float64Array.from(ids, id => logits[id] / temperature))
  if (top_p) {
    let before = 0
    probabilities = probabilities.map(p => {
      const kept = before < top_p ? p : 0
      before += p
      return kept
    })
  }
  if (min_p) {
    const threshold = min_p * probabilities.reduce((a, b) => Math.max(a, b))
    probabilities = probabilities.map(p => p < threshold ? 0 : p)
  }
  const sum = probabilities.reduce((a, b) => a + b)
  return {ids, probabilities: probabilities.map(p => p / sum)}
}

function argmax(x) {
  let best = 0
  for (let i = 1; i < x.length; i++) if (x[i] > x[best]) best = i
  return best
}

// The k ids with the largest logits, in descending order. Numbers alone sort faster than ids
function mostProbable(logits, ids, k) {
  if (k < logits.length) {
    const threshold = logits.slice().sort()[logits.length - k]
    ids = ids.filter(id => logits[id] >= threshold)
  }
  return ids.sort((a, b) => logits[b] - logits[a]).slice(0, k)
}

function draw({ids, probabilities}, random) {
  let rest = random()
  for (let i = 0; i < ids.length; i++) {
    rest -= probabilities[i]
    if (rest < 0) return ids[i]
  }
  return ids[argmax(probabilities)]  // the sum was a rounding error below 1
}

// How many of a text's newest tokens the model reads: window_length() of pocket/generate.py
function windowLength(length, blockSize) {
  if (length <= blockSize) return length
  const stride = Math.max(1, Math.floor(blockSize / 4))
  return length - Math.ceil((length - blockSize) / stride) * stride
}

// ---- Everything together

class Engine {
  constructor({header, buffer}) {
    this.header = header
    this.tok = new Tokenizer(header.tokenizer)
    this.template = header.template
    this.model = new Model({header, buffer})

    // Special tokens are never generated, but for those that end a reply
    this.banned = Object.values(this.tok.specialTokens).filter(id => !this.tok.eosIds.includes(id))
    for (let id = this.tok.tokens.length; id < header.config.vocab_size; id++) this.banned.push(id)
  }

  static async load(bytes) {
    return new Engine(await unpack(bytes))
  }

  // A prompt is {text}, or {turns: [[speaker, text], …]} for a model that was trained on
  // conversations. Returns ids, and the characters that were left out because it doesn't know them
  encode(prompt, maxNewTokens) {
    const unknown = new Set()
    const clean = text => {
      const strange = this.tok.unknown(text)
      for (const c of strange) unknown.add(c)
      return strange.length ? [...text].filter(c => !strange.includes(c)).join('') : text
    }
    let ids
    if (this.template) {
      const turns = prompt.turns.map(([speaker, text]) => [speaker, clean(text)])
      const {block_size} = this.header.config
      ids = encodeChatPrompt(this.tok, this.template, turns, block_size, maxNewTokens)
    } else {
      ids = this.tok.encodePrompt(clean(prompt.text))
    }
    return {ids, unknown: [...unknown]}
  }

  logits(ids) {
    return this.model.logits(ids.slice(-windowLength(ids.length, this.header.config.block_size)))
  }

  // Continue ids: yields one id after the other, until one of them ends the text
  * generate(ids, settings) {
    ids = ids.slice()
    const random = randomNumbers(settings.seed ?? 0)
    for (let i = 0; i < settings.max_new_tokens; i++) {
      const next = nextTokens(this.logits(ids), settings, ids, this.banned)
      const id = draw(next, random)
      ids.push(id)
      yield id
      if (this.tok.eosIds.includes(id)) return
    }
  }

  // What the page shows of ids: the tokens, what may come next, and where a head looks
  look(ids, {settings, layer, head}) {
    const next = nextTokens(this.logits(ids), {...settings, temperature: settings.temperature || 1},
      ids, this.banned)
    const order = mostProbable(next.probabilities, [...next.ids.keys()], 10)
    const read = this.model.ids
    const token = id => ({id, text: this.tok.show(id)})
    return {
      tokens: read.map(token),
      total: ids.length,
      next: order.filter(i => next.probabilities[i] > 0).map(i => ({
        ...token(next.ids[i]),
        probability: next.probabilities[i],
        ends: this.tok.eosIds.includes(next.ids[i]),
      })),
      attention: read.map((_, t) => this.model.attentionWeights(layer, head, t)),
    }
  }
}

// ---- In the Worker: what the page asks for, and what it gets

let engine
let job = 0  // number of the newest request: it ends an older one that still generates

const channel = new MessageChannel()
// Let messages of the page in. (A timer would wait 4 ms.)
const pause = () => new Promise(resume => {
  channel.port1.onmessage = resume
  channel.port2.postMessage(null)
})

async function generate(request) {
  const me = ++job
  const {ids, unknown} = engine.encode(request.prompt, request.settings.max_new_tokens)
  const all = [...ids, ...request.tail]
  const decode = engine.tok.streamDecoder()
  for (const id of request.tail) decode(id)  // it may end in the middle of a character
  const start = performance.now()
  let shown = start
  let fresh = []
  let count = 0
  let text = ''
  let reason = 'length'
  const report = () => postMessage({type: 'tokens', ids: fresh.splice(0), unknown, count,
    seconds: (performance.now() - start) / 1000})

  for (const id of engine.generate(all, request.settings)) {
    fresh.push(id)
    count++
    text += decode(id)
    if (engine.tok.eosIds.includes(id)) reason = 'end'
    if (request.settings.stop && text.includes(request.settings.stop)) {
      reason = 'stop'
      break
    }
    if (count > 1 && performance.now() - shown < 25) continue
    report()
    await pause()
    shown = performance.now()
    if (me !== job) {
      reason = 'stopped'
      break
    }
  }
  report()
  postMessage({type: 'done', reason})
}

function look(request) {
  const {ids, unknown} = engine.encode(request.prompt, request.settings.max_new_tokens)
  postMessage({type: 'look', number: request.number, unknown,
    ...engine.look([...ids, ...request.tail], request)})
}

async function load(request) {
  engine = await Engine.load(decodeBase64(request.payload))
  const {header} = engine
  postMessage({type: 'ready', header: {...header, tensors: null, tokenizer: null},
    tokens: engine.tok.tokens})
}

if (typeof module === 'object') {  // node
  module.exports = {Engine, decodeBase64, makeKernels, nextTokens, plainKernels}
} else {
  const handlers = {load, look, generate, stop: () => job++}
  onmessage = async ({data}) => {
    try {
      await handlers[data.type](data)
    } catch (error) {
      postMessage({type: 'error', message: error.message})
    }
  }
}
