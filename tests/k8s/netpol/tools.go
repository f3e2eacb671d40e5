//go:build tools

// Package netpol pins kube-router, of which the tests use the controller of network policies.
package netpol

import _ "github.com/cloudnativelabs/kube-router/v2/cmd/kube-router"
