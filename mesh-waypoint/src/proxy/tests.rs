//! The data path over real sockets.
