//! The DNS proxy: answers pods' queries for names of the mesh from the agent's own model.
//!
//! Why: a name that only the mesh knows (a `ServiceEntry` host with an allocated address) has to resolve, and a
//! headless service has to resolve to endpoints that the mesh would pick, without asking a server that may not
//! know either. Every other name goes to the server that the application asked.
