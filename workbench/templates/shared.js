// plotly does not break long titles
function fold(text, columns) {
  const lines = [""];
  for (const word of text.split(" ")) {
    const last = lines[lines.length - 1];
    if (last && (last + " " + word).length > columns) lines.push(word);
    else lines[lines.length - 1] = last ? last + " " + word : word;
  }
  return lines.join("<br>");
}
function data() {
  return JSON.parse(document.getElementById("data").textContent);
}
