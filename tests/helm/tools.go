//go:build tools

// Package helm names the program that is built from this module.
package helm

import _ "helm.sh/helm/v3/cmd/helm"
