//! Asking an external authorizer; no I/O.
