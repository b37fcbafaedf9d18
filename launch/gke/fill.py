"""Prints the manifest that gke.sh hands to the cluster. Needs nothing but Python 3.7.

fill.py jobset.yaml KEY=VALUE... -- VARIABLE=VALUE... -- ARGUMENT...

Each ${KEY} becomes its value as JSON, which YAML reads as it was.
"""

import json
import re
import sys


def written(value) -> str:
    """Returns JSON that is YAML too.

    YAML breaks lines at, or forbids, some characters that JSON does not escape. It
    takes no pairs of surrogates, so what is beyond U+FFFF stands as it is.
    """
    return re.sub(
        r"[^ -~\U00010000-\U0010ffff]",
        lambda found: f"\\u{ord(found[0]):04x}",
        json.dumps(value, ensure_ascii=False),
    )


template, *words = sys.argv[1:]
for word in words:
    # Kubernetes replaces $(NAME) and $$ in arguments and in the values of variables,
    # and takes the first byte after any other $ for a character.
    if re.search(r"[\ud800-\udfff]|\$(\$|\([\w.-]+\)|[^\0-\x7f])", word):
        why = "it has $$, $(NAME), or what is not ASCII after $, or is no UTF-8"
        print(f"error: {word!a} cannot be passed on: {why}", file=sys.stderr)
        sys.exit(2)
first = words.index("--")
second = words.index("--", first + 1)
values = dict(word.split("=", 1) for word in words[:first])
for key in ("SLICES", "HOSTS", "CHIPS", "MAX_RESTARTS"):
    values[key] = int(values[key])
values["ENVIRONMENT"] = [
    dict(zip(("name", "value"), word.split("=", 1)))
    for word in words[first + 1 : second]
]
values["ARGUMENTS"] = words[second + 1 :]
values["NODES"] = {
    "cloud.google.com/gke-tpu-accelerator": values["ACCELERATOR"],
    "cloud.google.com/gke-tpu-topology": values["TOPOLOGY"],
}
values["TOLERATIONS"] = []
if values["SPOT"] == "true":
    values["NODES"]["cloud.google.com/gke-spot"] = "true"
    values["TOLERATIONS"] = [{"key": "cloud.google.com/gke-spot", "operator": "Exists"}]
with open(template, encoding="utf-8") as file:
    text = file.read()
# In one pass: a ${KEY} in a value stays.
print(re.sub(r"\$\{(\w+)\}", lambda key: written(values[key[1]]), text), end="")
