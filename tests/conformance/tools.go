//go:build tools

// Package conformance: the echo server that the suite's pods run comes from the suite's own module.
package conformance

import _ "sigs.k8s.io/gateway-api/conformance/echo-basic"
