// Classify images: node classify.mjs FILE. FILE holds raw float32 images, one after the other; a label a line.
import { readFile } from "node:fs/promises";

if (process.argv.length !== 3) {
  console.error("usage: node classify.mjs FILE");
  process.exit(2);
}
const code = await readFile(new URL("classify.wasm", import.meta.url));
const { instance } = await WebAssembly.instantiate(code); // imports nothing
const { memory, input, output, input_elements, output_elements, run, error, _initialize } = instance.exports;
_initialize();

const image = new Float32Array(memory.buffer, input(), input_elements());
const scores = new Float32Array(memory.buffer, output(), output_elements());

function text(address) {
  const bytes = new Uint8Array(memory.buffer, address);
  return new TextDecoder().decode(bytes.subarray(0, bytes.indexOf(0)));
}

const bytes = await readFile(process.argv[2]);
if (bytes.length % image.byteLength !== 0) {
  console.error(`${process.argv[2]}: ${bytes.length} bytes are no whole number of images of ${image.byteLength}`);
  process.exit(1);
}
for (let at = 0; at < bytes.length; at += image.byteLength) {
  new Uint8Array(memory.buffer, image.byteOffset, image.byteLength).set(bytes.subarray(at, at + image.byteLength));
  const status = run();
  if (status !== 0) {
    console.error(text(error(status)));
    process.exit(1);
  }
  console.log(scores.indexOf(Math.max(...scores)));
}
