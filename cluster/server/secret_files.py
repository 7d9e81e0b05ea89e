"""Detects files with secrets that no job needs (keys, passwords, tokens), by common names or by content."""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePath

FOLDERS = {
    ".aws", ".azure", ".gnupg", ".huggingface", ".kaggle", ".kube", ".muster", ".oci", ".password-store", ".ray",
    ".secrets", ".ssh", ".terraform.d", ".env", ".env.d",
}  # fmt: skip
"""Everything below one of these is secret."""
PATHS = (
    ".cargo/credentials*", ".config/gcloud/*", ".config/gh/*", ".config/git/credentials", ".config/rclone/*",
    ".config/wandb/*", ".docker/config.json", ".m2/settings*.xml", ".mc/config.json", ".mlflow/credentials",
    ".streamlit/secrets.toml", "huggingface/stored_tokens", "huggingface/token", "wandb/settings",
)  # fmt: skip
"""Patterns for the end of a path."""
NAMES = (
    ".env*", "*.env", ".netrc*", "_netrc", ".git_credentials*", ".pypirc*", ".npmrc*", ".pgpass*", "pgpass.conf",
    ".my.cnf", ".mylogin.cnf", ".s3cfg", ".boto", ".dockercfg", ".dockerconfigjson", "*htpasswd", ".databrickscfg",
    ".vault_token", ".vault_pass*", "vault_pass*", "*kubeconfig*", "kube.config", "admin.conf", "*kaggle.json",
    "auth.json", "rclone.conf", "token", ".token", "*.token", "*_token", "token.txt", "*_token.txt", "tokens.txt",
    "secret", ".secret", "secrets", "secret.*", "secrets.*", "password*.txt", "passwords", "passwords.*", ".password*",
    "passwd", "passwd.txt", "*api_key", "*api_key.txt", "*api_keys.txt", "api_key.*", "api_keys.*", "apikey*",
    "*credentials", "*credentials.*", "credentials*.json", "accesskeys*.csv", "rootkey*.csv", "client_secret*.json",
    "*service*account*.json", "*.tfstate", "*.tfstate.*", "*.tfvars", "*.tfvars.json", ".terraformrc",
    "terraform.rc", "*.keytab", "secring", "secring.*", ".*_history",
    "bash_history", "zsh_history", "psql_history", "mysql_history", "python_history",
    "id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*",
    "ssh_host_*_key", "deploy_key*", "*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk",
    "*.kdbx", "*.agekey",
)  # fmt: skip
"""Patterns for names, with - replaced by _."""
CONTENTS = re.compile(
    rb"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:\s|\\n)+[A-Za-z0-9+/=:, -]{16}"
    rb"|(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"
    rb"|(?<![A-Za-z0-9_])(?:hf_[A-Za-z0-9]{34}|gh[opsur]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}"
    rb"|glpat-[A-Za-z0-9_-]{20}|sk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{40,200}|xox[abprs]-[0-9A-Za-z-]{24,200})"
    rb"(?![A-Za-z0-9])"
)
"""PEM's private keys, and keys as AWS, Hugging Face, GitHub, GitLab, OpenAI, Anthropic and Slack issue them."""
MARKS = (
    b"PRIVATE KEY", b"AKIA", b"ASIA", b"hf_", b"ghp_", b"gho_", b"ghs_", b"ghu_", b"ghr_", b"github_pat_", b"glpat-",
    b"sk-", b"xox",
)  # fmt: skip
"""Every match contains one of these. Without this check the search would take 10 ms per file."""
SHOWN = ("*.pub", "*.example", "*.sample", "*.template", "*.tmpl", "*.dist", "*.defaults")
"""Public keys, and templates without values."""
WRITTEN = ("*.py", "*.pyi", "*.ipynb", "*.md", "*.rst", "*.tex", "*.html")
"""Code and prose about secrets, unless the name begins with .env."""
COPIES = (
    "~",
    ".bak",
    ".backup",
    ".old",
    ".orig",
    ".save",
    ".swp",
    ".swo",
    ".gz",
    ".xz",
    ".bz2",
    ".zst",
    ".zip",
    ".gpg",
    ".enc",
)
"""Suffixes of backups and archives."""
COPIED = re.compile(r"[ _-]?\(\d{1,3}\)(?=\.|$)| \(copy\)(?=\.|$)| - copy(?=\.|$)|^copy of |\.\d{1,3}$")
"""Added by file managers and log rotation."""
SEARCHED = 64 * 2**10
"""Bytes at the beginning of a file that are searched for secrets."""


def is_secret(path: PurePath) -> bool:
    """Whether a file is secret by its path below the user's folder."""
    *above, name = (part.lower() for part in path.parts)
    if not FOLDERS.isdisjoint(above):
        return True
    name = _of_the_original(name)
    if _is_one_of(name, SHOWN) or (_is_one_of(name, WRITTEN) and not name.startswith(".env")):
        return False
    whole = "/".join(("", *above, name))
    return _is_one_of(name.replace("-", "_"), NAMES) or _is_one_of(whole, [f"*/{end}" for end in PATHS])


def _of_the_original(name: str) -> str:
    """The name of the original, if this is the name of a copy."""
    before = ""
    while name != before:
        before = name
        name = COPIED.sub("", name.strip()) or name
        if len(name) > 2 and name.startswith("#") and name.endswith("#"):  # an auto-save file of Emacs
            name = name[1:-1]
        if ending := next((ending for ending in COPIES if name.endswith(ending)), None):
            name = name.removesuffix(ending)
            if ending.startswith(".sw"):  # a swap file of vim: `..env.swp`
                name = name.removeprefix(".")
    return name


def _is_one_of(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def holds_secret(file: Path, tokens: Iterable[bytes]) -> bool:
    """Whether the first SEARCHED bytes of a file contain a key or one of the tokens. Raises OSError."""
    with file.open("rb") as opened:
        content = opened.read(SEARCHED)
    found = any(mark in content for mark in MARKS) and CONTENTS.search(content)
    return bool(found) or any(token in content for token in tokens)
