//! The data workers: one OS thread each, which owns a connection from accept to close.
//!
//! The control runtime talks to a worker by [`Command`]s only. Each pod has three listeners per worker, in one
//! reuse-port group per kind, so that the kernel spreads new connections over the workers.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_core::error::Code;
use mesh_core::hbone::BaggageHeader;
use mesh_core::state::Workload;
use mesh_core::telemetry::{DryRunCounters, HandleCache, LimitLabels};
use serde::Serialize;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::LocalOptions;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::dial::TunnelHandle;
use super::failed::Failed;
use super::limits::Permit;
use super::live::Registry;
use super::pool::Pool;
use super::suspects::Suspects;
use super::{Pod, Shared, inbound, outbound, plaintext};
