"""The rules: what each is called, why it holds, and what to write instead."""

from __future__ import annotations

from typing import Final

from creche_server.scan.findings import Rule

UNREADABLE: Final = "CR000"
MODULE_STATE: Final = "CR001"
CLASS_STATE: Final = "CR002"
GLOBAL_WRITE: Final = "CR003"
CLASS_WRITE: Final = "CR004"
PATCH: Final = "CR005"
MUTABLE_DEFAULT: Final = "CR006"
CACHE: Final = "CR007"
SHARED_INSTANCE: Final = "CR008"
PROCESS_SETTING: Final = "CR009"
CONTEXT_DEFAULT: Final = "CR010"
AMBIENT_IDENTITY: Final = "CR011"
LOOSE_TASK: Final = "CR012"
SINGLETON: Final = "CR013"
KEPT_NURSERY: Final = "CR014"
BLANK_ESCAPE: Final = "CR090"
UNUSED_ESCAPE: Final = "CR091"

RULES: Final = (
    Rule(
        UNREADABLE,
        "file that cannot be read",
        "What cannot be parsed cannot be cleared.",
        "Mend the file, or leave it out of the scan.",
    ),
    Rule(
        MODULE_STATE,
        "mutable object at module level",
        "A module exists once in a process: what one user's run puts there, every other finds.",
        "Make it immutable (tuple, frozenset, MappingProxyType), or make it in the block of the "
        "run and pass it as an argument.",
    ),
    Rule(
        CLASS_STATE,
        "mutable class attribute",
        "A class's attribute is one object for all instances, so for all runs.",
        "Set it in __init__, use dataclasses.field(default_factory=...), or make it immutable.",
    ),
    Rule(
        GLOBAL_WRITE,
        "module variable rebound or changed by a function",
        "The last run to write it decides what all others read.",
        "Return the value, or keep it on an object that is made for each run.",
    ),
    Rule(
        CLASS_WRITE,
        "attribute of a class or function written at run time",
        "It changes for every instance and every run, not for this one.",
        "Write to `self`, or pass the value.",
    ),
    Rule(
        PATCH,
        "another module or an imported class changed",
        "Everybody in the process who uses it gets the change, other users' runs too.",
        "Pass what differs as an argument, or subclass.",
    ),
    Rule(
        MUTABLE_DEFAULT,
        "mutable default argument",
        "A default is made once; what one call puts in, the next call finds.",
        "Default to None or an empty tuple, and make the object inside the function.",
    ),
    Rule(
        CACHE,
        "cache that outlives a run",
        "It keeps users' objects after their run has ended and may answer one with another's.",
        "Keep results on an object of the run; cache only pure functions of plain values.",
    ),
    Rule(
        SHARED_INSTANCE,
        "stateful object at module or class level",
        "Clients, sessions, locks, queues and files made on import belong to nobody: "
        "all runs share them, and nobody closes them.",
        "Open it in an `async with` block of the server, and pass it to whom it is for.",
    ),
    Rule(
        PROCESS_SETTING,
        "process-wide setting changed",
        "The environment, the working directory, the locale, signal handlers and the import path "
        "are one for all runs.",
        "Pass the value: env= and cwd= of a subprocess, absolute paths, arguments.",
    ),
    Rule(
        CONTEXT_DEFAULT,
        "ContextVar with a mutable default",
        "The default is one object, which every context that has set nothing gets.",
        "Give it no default or an immutable one, and set a fresh object in each run.",
    ),
    Rule(
        AMBIENT_IDENTITY,
        "identity read from global state",
        "What is looked up can be somebody else's: a task started elsewhere, a thread of a pool.",
        "Pass the context, or the user's id, as an argument.",
    ),
    Rule(
        LOOSE_TASK,
        "task or thread that nothing waits for",
        "It goes on when its run has ended, with that run's data, and nothing can cancel it.",
        "Start it in a nursery that is opened in the same block, or join it there.",
    ),
    Rule(
        SINGLETON,
        "singleton",
        "One instance for the process is one instance for all users.",
        "Make the object where its owner begins, and pass it.",
    ),
    Rule(
        KEPT_NURSERY,
        "nursery kept beyond its block",
        "Whoever reaches it can start tasks that outlive their run, or cancel another's.",
        "Open a nursery where the tasks belong, or take one as an argument and do not keep it.",
    ),
    Rule(
        BLANK_ESCAPE,
        "escape without a reason",
        "An escape claims that sharing is safe; whoever reads it must be able to judge the claim.",
        "Write `# creche: shared` and then why it is safe.",
    ),
    Rule(
        UNUSED_ESCAPE,
        "escape that explains nothing",
        "It would silence the next finding on its line, for a reason that was given for another.",
        "Remove it.",
    ),
)


def rule_of(rule_id: str) -> Rule:
    """The rule with that id, which must be one of ours."""
    return next(rule for rule in RULES if rule.id == rule_id)
