"""What `writes` imports."""


class Other:
    name = ""


current = Other
