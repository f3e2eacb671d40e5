//go:build tools

// Package echo pins the version of programs that are built from elsewhere.
package echo

import (
	_ "istio.io/istio/pkg/test/echo/cmd/client"
	_ "istio.io/istio/pkg/test/echo/cmd/server"
)
