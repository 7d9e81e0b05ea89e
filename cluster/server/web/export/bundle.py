"""The front end's modules as one script: a page that is opened from a file may load none."""

import posixpath
import re

from ..static_files import STATIC

INSTEAD = "js/exported/"
"""A module of this folder stands for the one of its name in `js/`, which asks a server."""
_IMPORT = re.compile(r'^import (?:\{([^}]*)\}|\* as (\w+)|(\w+)) from "([^"]+)";$', flags=re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const) (\w+))", flags=re.MULTILINE)
_DEFAULT = re.compile(r"^export \{ (\w+) as default \};$", flags=re.MULTILINE)
_LEFT = re.compile(r"^(?:import|export)\b.*$", flags=re.MULTILINE)


def bundled(entry: str) -> str:
    """A module such as `js/exported/main.js` with all that it imports, each once and after what it imports itself.

    Modules are as this project writes them: imports of names, of everything or of a default, each on a line of its
    own; exports where a function, class or constant is declared, or of a default alone; none imports itself over
    others.
    """
    parts: dict[str, str] = {}
    _add(entry, parts, ())
    script = '"use strict";\nconst modules = {};\n' + "".join(parts.values())
    assert not re.search(r"</script|<!--", script, flags=re.IGNORECASE), "the script would end the element it stands in"
    return script


def _add(name: str, parts: dict[str, str], above: tuple[str, ...]) -> None:
    assert name not in above, f"{name} imports itself over {above}"
    if name in parts:
        return
    text, heads = (STATIC / name).read_text(encoding="utf-8"), []
    for names, everything, default, path in _IMPORT.findall(text):
        module = _found(name, path)
        _add(module, parts, (*above, name))
        wanted = everything or (f"{{ default: {default} }}" if default else "{" + names.replace(" as ", ": ") + "}")
        heads.append(f'const {wanted} = modules["{module}"];')
    # A library's old exports may stand in its comments.
    exported = [f"default: {own}" for own in _DEFAULT.findall(text)] or _EXPORT.findall(text)
    body = _DEFAULT.sub("", _EXPORT.sub("", _IMPORT.sub("", text)))
    assert not (left := _LEFT.findall(body)), f"{name}: {left[0]}"
    inner = "\n".join([*heads, body, f"return {{ {', '.join(exported)} }};"])
    parts[name] = f'modules["{name}"] = (() => {{\n{inner}\n}})();\n'


def _found(importer: str, path: str) -> str:
    name = posixpath.normpath(posixpath.join(posixpath.dirname(importer), path))
    instead = INSTEAD + posixpath.basename(name)
    asks_a_server = posixpath.dirname(name) == "js" and not importer.startswith(INSTEAD)
    return instead if asks_a_server and (STATIC / instead).is_file() else name
