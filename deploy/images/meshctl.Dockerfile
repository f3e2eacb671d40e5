# For those who have a container engine; `cargo xtask cluster images --dist` makes the same image without one.
#
#   cargo xtask cluster images --dist     # prints the directory of the images, with the stripped programs in it
#   docker build -f deploy/images/meshctl.Dockerfile -t undermesh/meshctl:dev DIRECTORY
#
# The program is linked against the C library of the machine that builds it, which must not be newer than the image's.
# Without root, a shell or a package manager.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY meshctl /usr/local/bin/meshctl
ENTRYPOINT ["/usr/local/bin/meshctl"]
