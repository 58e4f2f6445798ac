"""What a notebook calls: every command as a function of a path or an open store.

Inside, each module uses those before it: ``source`` (what is accepted, and ``open``), ``questions``
(what reads Gram matrices), ``actions`` (what writes, or reads everything).
"""
