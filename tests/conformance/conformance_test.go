// Package conformance runs the Gateway API's conformance suite as it is published. What it runs on and which profiles
// and features it checks come as its own flags; see `cargo xtask test conformance`.
package conformance

import (
	"testing"

	"sigs.k8s.io/gateway-api/conformance"
)

func TestConformance(t *testing.T) {
	conformance.RunConformance(t)
}
