// A plain script, so that the first paint already has the colours that were chosen.
try {
  const theme = localStorage.getItem("muster-theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage the system's setting holds.
}
