"""What `creche scan` must find: a line that breaks a rule ends in an arrow and the rule's id.

Nothing here is ever run, and no other tool looks at it. Lines without an arrow are near misses.
"""
