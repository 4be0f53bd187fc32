"""The Triton backend: PAC, its derivatives and the distances as GPU programs.

Nothing here is imported before the backend is used: `refusal` alone knows of it without Triton.
"""
