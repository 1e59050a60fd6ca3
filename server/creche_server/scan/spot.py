"""A node in its file and project: what the rules look at, and how they report."""

from __future__ import annotations

import ast
import dataclasses

from creche_server.scan import known
from creche_server.scan.findings import Finding
from creche_server.scan.project import File, Project
from creche_server.scan.scopes import Place, Scope
from creche_server.scan.values import Value, mentions, what_annotation_says, what_is


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """One node, with all that a rule may ask about it."""

    place: Place
    file: File
    project: Project

    @property
    def node(self) -> ast.AST:
        return self.place.node

    @property
    def scope(self) -> Scope:
        return self.place.scope

    @property
    def in_function(self) -> bool:
        return self.scope.function is not None

    def resolve(self, node: ast.expr) -> str | None:
        """The dotted name that an expression stands for."""
        return self.project.resolve(self.scope, node)

    def called(self) -> str:
        """The dotted name of what this node calls; empty if it is no call of a known name."""
        return (self.resolve(self.node.func) or "") if isinstance(self.node, ast.Call) else ""

    def meanings(self, node: ast.expr) -> list[ast.expr]:
        """The expression, and, for a variable of the function, what it is assigned."""
        return [found for found, _ in self.project.meanings(node, self.scope)]

    def what_is(self, node: ast.expr) -> Value | None:
        return what_is(node, self.scope, self.project)

    def what_annotation_says(self, node: ast.expr | None) -> Value | None:
        return what_annotation_says(node, self.scope, self.project)

    def finding(
        self,
        rule: str,
        message: str,
        at: ast.expr | ast.stmt,
        *,
        symbol: str = "",
    ) -> Finding:
        """Report `at`; an escape counts there, and on the first line of its statement."""
        source = self.file.source
        lines = {at.lineno, self.place.statement.lineno}
        if isinstance(self.node, ast.stmt):
            lines.add(self.node.lineno)
        return Finding(
            rule=rule,
            path=source.path,
            line=at.lineno,
            column=source.column(at),
            message=message,
            symbol=symbol,
            source=source.line(at.lineno).rstrip(),
            escapes=tuple(sorted(lines)),
        )

    def carries_identity(
        self,
        parameter: ast.arg,
        names: frozenset[str] = known.IDENTITY_CARRIERS,
    ) -> bool:
        """Whether a parameter says, by its type or its name, for whom something is done."""
        if mentions(parameter.annotation, known.IDENTITY_TYPES):
            return True
        if parameter.annotation is not None:
            named = self.project.resolve(self.scope, parameter.annotation)
            if named in known.NO_IDENTITY:
                return False
        return known.is_identity_name(parameter.arg, names)
