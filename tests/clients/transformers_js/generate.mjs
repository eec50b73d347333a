// Greedy generation by transformers.js: a request a line on stdin, an answer a line on stdout.
// Run in the directory that holds node_modules. See tests/clients/generation.py for the fields.

import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { createInterface } from "node:readline";

const library = createRequire(`${process.cwd()}/`)("@huggingface/transformers");
const { AutoModelForCausalLM, Tensor, cat, env, ones } = library;

env.allowRemoteModels = false;

const integers = (rows) =>
  new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

async function answer({ directory, tokens, mask, new_tokens, options }) {
  env.localModelPath = dirname(directory);
  const model = await AutoModelForCausalLM.from_pretrained(basename(directory), {
    dtype: "fp32", device: "cpu", local_files_only: true, ...options,
  });
  const attention_mask = integers(mask);
  const generated = await model.generate({
    inputs: integers(tokens), attention_mask, max_new_tokens: new_tokens, do_sample: false,
  });
  const [batch, length] = generated.dims;
  const rest = ones([batch, length - mask[0].length]);
  const whole = { input_ids: generated, attention_mask: cat([attention_mask, rest], 1) };
  const { logits } = await model(whole);
  await model.dispose();
  return { tokens: generated.tolist().map((row) => row.map(Number)), logits: logits.tolist() };
}

for await (const line of createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await answer(JSON.parse(line))));
}
