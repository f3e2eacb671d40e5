# For those who have a container engine; `cargo xtask cluster images --dist` makes the same image without one.
#
#   cargo xtask cluster images --dist     # prints the directory of the images, with the stripped programs in it
#   docker build -f deploy/images/mesh-node.Dockerfile -t undermesh/mesh-node:dev DIRECTORY
#
# The program is static and needs nothing of the image.
# Root, because it enters the pods' namespaces and loads kernel programs; the chart takes away what it does not need.
FROM gcr.io/distroless/static-debian12:latest
COPY mesh-node /usr/local/bin/mesh-node
ENTRYPOINT ["/usr/local/bin/mesh-node"]
