//! Sockets: HBONE and HTTP on both sides.
