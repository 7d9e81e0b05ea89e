"""Which files of a user's folder are secrets that no job needs: keys, passwords, tokens, by their usual names."""

import os
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path, PurePath

FOLDERS = {
    ".aws", ".azure", ".gnupg", ".huggingface", ".kaggle", ".kube", ".muster", ".oci", ".password-store", ".ray",
    ".secrets", ".ssh", ".terraform.d",
}  # fmt: skip
"""All that is below one of these."""
PATHS = (
    ".cargo/credentials*", ".config/gcloud/*", ".config/gh/*", ".config/git/credentials", ".config/rclone/*",
    ".config/wandb/*", ".docker/config.json", ".mlflow/credentials", ".streamlit/secrets.toml",
    "huggingface/stored_tokens", "huggingface/token", "wandb/settings",
)  # fmt: skip
"""Ends of a path."""
NAMES = (
    ".env*", "*.env", ".netrc*", "_netrc", ".git-credentials*", ".pypirc*", ".npmrc*", ".pgpass*", ".my.cnf", ".s3cfg",
    ".boto", ".dockercfg", ".dockerconfigjson", ".htpasswd", ".databrickscfg", ".vault-token", "kubeconfig*",
    "kaggle.json", "auth_token", "credentials", "credentials.*", "application_default_credentials.json",
    "client_secret*.json", "service*account*.json", "secret.*", "secrets.*", "*.tfstate", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.ppk", "*.kdbx",
    "*.agekey",
)  # fmt: skip
HARMLESS = ("*.pub", "*.py", "*.ipynb", "*.md", "*.example", "*.sample", "*.template", "*.tmpl", "*.dist", "*.defaults")
"""Public keys, code and prose about secrets, and what shows which keys a file has."""
COPIES = ("~", ".bak", ".backup", ".old", ".orig", ".save", ".swp", ".swo")
"""What editors and people append."""
LARGEST = 64 * 2**10
"""Bytes of a file that is searched for tokens."""


def is_secret(path: PurePath) -> bool:
    """Whether a file, by its path below the user's folder, is one that only its owner is to have."""
    *above, name = (part.lower() for part in path.parts)
    if not FOLDERS.isdisjoint(above):
        return True
    while ending := next((ending for ending in COPIES if name.endswith(ending)), None):
        name = name.removesuffix(ending)
        if ending.startswith(".sw"):  # vim's, of `.env`: `..env.swp`
            name = name.removeprefix(".")
    if any(fnmatch(name, harmless) for harmless in HARMLESS):
        return False
    whole = "/".join(("", *above, name))
    return any(fnmatch(name, usual) for usual in NAMES) or any(fnmatch(whole, f"*/{end}") for end in PATHS)


def holds_token(file: Path, tokens: Iterable[bytes]) -> bool:
    """Whether a small file has a cluster's token in it, wherever it lies and whatever its name. Raises OSError."""
    if not 0 < os.stat(file).st_size <= LARGEST:
        return False
    content = file.read_bytes()
    return any(token in content for token in tokens)
