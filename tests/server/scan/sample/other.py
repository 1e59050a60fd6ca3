"""What `writes` imports."""

import acme


class Other:
    name = ""


current = Other
state = acme.state()
