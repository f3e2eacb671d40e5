# For those who have a container engine; `cargo xtask cluster images --dist` makes the same image without one.
#
#   cargo xtask cluster images --dist     # prints the directory of the images, with the stripped programs in it
#   docker build -f deploy/images/mesh-control.Dockerfile -t undermesh/mesh-control:dev DIRECTORY
#
# The program is static and needs nothing of the image.
# Without root, a shell or a package manager.
FROM gcr.io/distroless/static-debian12:nonroot
COPY mesh-control /usr/local/bin/mesh-control
ENTRYPOINT ["/usr/local/bin/mesh-control"]
