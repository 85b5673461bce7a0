"""Plug-ins of serving engines, which their entry points load; nothing of this package imports them."""
