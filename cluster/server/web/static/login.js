// Logs in with the token of the link, which is after the #, so that no server and no log ever sees it; or with one typed.
const form = document.getElementById("login");
const said = document.getElementById("said");

async function logIn(token) {
  const answer = await fetch("/login", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ token }),
  });
  if (answer.ok) {
    location.replace(location.pathname === "/login" ? "/" : location.pathname + location.search);
    return;
  }
  const told = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  said.textContent = told.error;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  logIn(document.getElementById("token").value);
});

if (location.hash.length > 1) {
  const token = location.hash.slice(1);
  history.replaceState(null, "", location.pathname + location.search);
  logIn(token);
}
