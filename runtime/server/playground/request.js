// From the form's fields to the fields of a request. The server checks them: it says best what is wrong.

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

/** The parameters that are filled in. Reads the fields by their ids. */
export function parameters() {
  const fields = {};
  for (const name of NUMBERS) {
    const input = document.getElementById(name);
    // A field of type number that holds none has an empty value; the server gets to say so.
    const text = input.validity.badInput ? "not a number" : input.value.trim();
    if (text !== "") fields[name] = numberOrText(text);
  }
  const stop = stopStrings(document.getElementById("stop_strings").value);
  if (stop.length > 0) fields.stop = stop;
  return fields;
}

/** A number, or the text as it stands where it is none, or where a number would not hold all of its digits. */
function numberOrText(text) {
  const number = Number(text);
  return Number.isFinite(number) && (!Number.isInteger(number) || Number.isSafeInteger(number)) ? number : text;
}

/** One stop string a line; empty lines are none. */
function stopStrings(text) {
  const signs = { n: "\n", t: "\t", "\\": "\\" };
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\([nt\\])/g, (_, sign) => signs[sign]));
}
