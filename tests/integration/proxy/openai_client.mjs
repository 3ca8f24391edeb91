// A program on OpenAI's client, given its base URL by the environment, as any other; it prints what it saw.
import OpenAI from "openai";

const client = new OpenAI({ maxRetries: 2, timeout: 20_000 });
const asked = { model: "m", messages: [{ role: "user", content: "Name a city." }] };

const { data, response } = await client.chat.completions.create({ ...asked, n: 2 }).withResponse();
const seen = {
  choices: data.choices.map((choice) => choice.message.content),
  requestId: data._request_id,
  status: response.headers.get("cache-status"),
};

let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
seen.streamed = streamed;

const repeats = await Promise.all([1, 2, 3].map(() => client.chat.completions.create({ ...asked, seed: 7 })));
seen.repeats = repeats.map((answer) => answer.choices[0].message.content).sort();

seen.response = (await client.responses.create({ model: "m", input: "Name a river." })).output_text;
const vectors = await client.embeddings.create({ model: "e", input: ["a", "b", "a"] });
seen.embeddings = vectors.data.map((item) => item.embedding);

const errors = [];
try {
  await client.chat.completions.create({ ...asked, messages: [] });
} catch (error) {
  errors.push([error.constructor.name, error.status]);
}
try {
  await client.models.retrieve("org/none");
} catch (error) {
  errors.push([error.constructor.name, error.status]);
}
seen.errors = errors;
seen.models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify(seen));
