#!/usr/bin/env python3
"""A chat on the public Python API; an empty line, or the end of the input, ends it.

    python docs/examples/chat_loop.py [MODEL.dcalm]       (default: the demo model, which answers with stories)

Each turn renders the whole conversation and computes only what follows the longest prefix that the cache still holds.
A model without a chat template goes on with the text, yours and its own.
"""

from __future__ import annotations

import sys

import deepcalm


def main() -> None:
    model = deepcalm.Model(sys.argv[1] if len(sys.argv) > 1 else deepcalm.demo_path())
    session = model.session()
    messages: list[dict[str, str]] = []
    for line in iter(lambda: input("> "), ""):
        if model.has_chat_template:
            messages.append({"role": "user", "content": line})
            ids = model.encode_chat(messages)
            kept = session.reuse(ids)  # cuts the session to the prefix that both have
        else:
            ids, kept = [*session.tokens.tolist(), *model.encode(line, bos=not session.pos)], session.pos
        answer = session.generate(ids[kept:], max_tokens=256, **model.sampling_defaults).text()
        for piece in answer:
            print(piece, end="", flush=True)
        print(f"\n[{answer.reason}; {kept} of {len(ids)} tokens from the cache]")
        messages.append({"role": "assistant", "content": answer.text})


if __name__ == "__main__":
    try:
        main()
    except EOFError:
        print()
    except deepcalm.Error as e:  # no such file, the context is full, ...: one line says what
        sys.exit(f"chat_loop: {e}")
