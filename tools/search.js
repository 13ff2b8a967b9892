// Search by words: a section is found if it has every word, wherever they stand; words in its name count most. Fuse's own, which
// tolerates slips of the pen, is asked only where no section has them all.
(() => {
  const Fuzzy = window.Fuse;
  const places = (text, word) => {
    const res = [];
    for (let i = text.indexOf(word); i >= 0; i = text.indexOf(word, i + 1)) res.push(i);
    return res;
  };
  const closest = (text, words) => {  // where the words stand closest together, and over how many characters they are spread
    const all = words.map((w) => places(text, w)).filter((o) => o.length);
    const spread = (at) => all.reduce((sum, o) => sum + Math.min(...o.map((i) => Math.abs(i - at))), 0);
    return (all[0] || [0]).map((at) => ({ at, spread: spread(at) })).reduce((a, b) => (b.spread < a.spread ? b : a));
  };
  const score = (entry, words) => {
    const name = entry.section.toLowerCase(), page = entry.title.toLowerCase(), text = entry.text.toLowerCase();
    if (!words.every((w) => name.includes(w) || page.includes(w) || text.includes(w))) return 0;
    const named = (w) => (name === w ? 9 : name.startsWith(w) ? 5 : name.includes(w) ? 4 : 0) + (page.includes(w) ? 2 : 0);
    const together = words.length > 1 && words.every((w) => text.includes(w)) ? 200 / (20 + closest(text, words).spread) : 0;
    return words.reduce((sum, w) => sum + named(w) + (text.includes(w) ? 1 : 0), together);
  };
  const around = (text, words) => text.slice(Math.max(0, closest(text.toLowerCase(), words).at - 60));
  window.Fuse = class {
    constructor(entries, options) { this.entries = entries; this.fuzzy = new Fuzzy(entries, options); }
    search(query, { limit }) {
      const words = query.toLowerCase().split(/\s+/).filter(Boolean);
      const found = this.entries.map((item) => ({ item, score: score(item, words) })).filter((o) => o.score > 0);
      if (!found.length) return this.fuzzy.search(query, { limit });
      found.sort((a, b) => b.score - a.score);
      return found.slice(0, limit).map(({ item }) => ({ item: { ...item, text: around(item.text, words) } }));
    }
  };
})();
