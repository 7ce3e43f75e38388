"""The commands of `taid-vlm`, one file each, imported when it is called.

`taid_vlm.commands.NAME` holds the options as a pydantic model, `NameOptions`, and carries them out
in `run(options)`, which imports what takes seconds; where there is one, `INTERRUPTED` says how to
go on after Ctrl-C.
"""

COMMANDS = {  # and what each is for
    "init": "write a recipe to begin with",
    "recipes": "list the recipes that come with the package",
    "inspect": "say whether a recipe can work, what is compared, and what to change",
    "plan": "say how much memory a recipe needs, and what to change if it does not fit",
    "distill": "carry out a recipe",
    "cache": "ask a recipe's teacher once, and keep its hidden states for training without it",
    "shrink": "make a student of a teacher: fewer layers, fewer image tokens",
    "compose": "make a student of a vision tower and a language model",
    "merge": "write a LoRA student as a model of its own",
    "evaluate": "let models answer benchmarks, and judge the answers",
    "generate": "write a model's answers as records to train on",
    "export": "write benchmarks as tables for VLMEvalKit",
    "compare": "say which of several runs is best, by how much, and how sure that is",
    "publish": "put a run's student, its card and figures into a folder or on the hub",
    "demo": "distil a VLM and a text LLM offline, in minutes",
    "schema": "print the JSON Schema of a recipe or a benchmark, for editors",
    "completion": "print what makes a shell complete commands and options",
}
